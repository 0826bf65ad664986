"""The training half of the LightningModule: loss, gradient and their checks, step by step."""

from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from moka_pl._compat import multiply_all_
from moka_pl.data.types import Batch
from moka_pl.evaluation.module import EvaluatedModule
from moka_pl.lm.attention import PackedAttention
from moka_pl.lm.compiled import compile_layers, restore_layers
from moka_pl.lm.cuda_graphs import StepCapture, fix_size
from moka_pl.lm.scoring import Predicted, TokenScores, predicted, score_tokens
from moka_pl.training.learning_rates import LearningRateRatios, logged_rates
from moka_pl.training.non_finite import NonFiniteSteps


class TrainedModule(EvaluatedModule):
    """A causal language model that is trained on labelled tokens.

    Args:
        learning_rate_ratios: Multiples of the optimizer's learning rate, to be logged.
        cuda_graphs: Whether to replay steps as CUDA graphs.
        max_non_finite_steps: So many steps in a row that are not finite end the run.
    """

    def __init__(
        self, learning_rate_ratios: LearningRateRatios, cuda_graphs: bool, max_non_finite_steps: int
    ) -> None:
        super().__init__()
        self.learning_rate_ratios = replace(learning_rate_ratios)
        self.cuda_graphs = cuda_graphs
        self._non_finite = NonFiniteSteps(self, max_non_finite_steps)
        self._token_accumulator: Tensor | None = None
        self._packed: PackedAttention | None = None
        self._capture: StepCapture | None = None

    def _begin_steps(self) -> None:
        """Resets what is kept from step to step."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        self._token_accumulator = torch.zeros(2, dtype=dtype, device=self.device)
        self._non_finite.begin()
        if self.backbone.compile == "layers":
            rank_zero_info(f"compiling {compile_layers(self.causal_lm)} decoder layers in the first steps")
        if self.cuda_graphs:
            self._capture = StepCapture(self.causal_lm)
            if self._capture.unsupported_reason is not None and self.device.type == "cuda":
                rank_zero_info(f"no CUDA graphs: {self._capture.unsupported_reason}")

    def on_train_end(self) -> None:
        """Frees the CUDA graphs, and ends a run with an error if its weights are not finite."""
        self._capture = None
        restore_layers(self.causal_lm)
        self._non_finite.finish()

    def prepare_batch(self, batch: Batch) -> Batch:
        """Prepares a batch while it is still on the CPU; the data modules of this package call it."""
        if not self.trainer.training:
            return batch
        batch = self._fixed(batch)
        if self.device.type != "cuda" or batch["labels"].is_cuda or "item" in batch or "fixed" in batch:
            return batch
        batch = batch.copy()
        # Pinned memory is copied to the GPU while the CPU goes on.
        batch["predicted"] = Predicted(*(tensor.pin_memory() for tensor in predicted(batch["labels"])))
        return batch

    def _fixed(self, batch: Batch) -> Batch:
        """Adds the batch in a size that can be recorded; on a GPU the GPU would have to be waited for."""
        if self._capture is None or self._capture.unsupported_reason is not None:
            return batch
        if "position_ids" in batch or "item" in batch or "fixed" in batch:
            return batch
        return {**batch, "fixed": fix_size(batch)}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the summed negative log-likelihood of the micro-batch's completion tokens.

        The division by the number of tokens happens once the whole batch of the optimizer step is known.
        """
        batch = self._fixed(batch)  # where the data module did not
        if "fixed" in batch:
            assert self._capture is not None
            total, tokens = self._capture(batch["fixed"]), batch["fixed"].tokens
        else:
            scores = self.token_scores(batch)
            total, tokens = scores.nll.sum(), scores.nll.numel()
        assert self._token_accumulator is not None
        self._non_finite.add(batch)
        self._token_accumulator[0] += total.detach()
        self._token_accumulator[1] += tokens
        return total

    def token_scores(self, batch: Batch) -> TokenScores:
        """Scores the completion tokens of a micro-batch, as training does."""
        packed = self._prepare_packing().inputs(batch) if "position_ids" in batch else {}
        labels = batch["predicted"] if "predicted" in batch else batch["labels"]
        return score_tokens(self.causal_lm, batch["input_ids"], labels, **packed)

    def _prepare_packing(self) -> PackedAttention:
        if self._packed is None:
            self._packed = PackedAttention(self.causal_lm)
            rank_zero_info(f"packed batches: {self._packed}")
        return self._packed

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turns gradients of the sum into gradients of the mean over all tokens, and logs the step.

        Lightning has divided the sums by the number of accumulated micro-batches, and DDP by the number of
        ranks; both are multiplied back before the division by all tokens.
        """
        assert self._token_accumulator is not None
        sums = self._token_accumulator
        if self.trainer.world_size > 1:
            torch.distributed.all_reduce(sums)  # the strategy's own would have the CPU wait in a barrier
        total, tokens = sums[0], sums[1].clamp(min=1)
        loss = (total / tokens).float()
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches / tokens
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        multiply_all_(gradients, factor.to(torch.float32))
        norm = torch.nn.utils.get_total_norm(gradients)
        self._token_accumulator.zero_()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/grad_norm", norm)
        for name, rate in logged_rates(optimizer, self.learning_rate_ratios).items():
            # A number would be copied to the GPU, for which the CPU waits.
            self.log(name, torch.as_tensor(rate, dtype=torch.get_default_dtype()))
        self._non_finite.check(optimizer, loss, norm)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *clip: Any, **clipping: Any
    ) -> None:
        """Clips the gradients, where the step has any."""
        if not self._non_finite.skipping:
            super().configure_gradient_clipping(optimizer, *clip, **clipping)

    def on_train_batch_end(self, *of_batch: Any) -> None:
        """Ends a run whose steps are no longer finite."""
        self._non_finite.raise_error()
