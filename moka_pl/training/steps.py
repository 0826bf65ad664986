"""The training half of the LightningModule: loss, gradient and their checks, step by step."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from moka_pl._compat import multiply_all_
from moka_pl.adapters.forward import count_merged
from moka_pl.backbone import compute_dtype
from moka_pl.backbone.products.float8 import check_float8
from moka_pl.data.types import Batch
from moka_pl.errors import ConfigError
from moka_pl.evaluation.module import EvaluatedModule
from moka_pl.lm.attention import PackedAttention
from moka_pl.lm.compiled import check_compiler, compile_layers, restore_layers
from moka_pl.lm.cuda_graphs import StepCapture, fix_size
from moka_pl.lm.scoring import IGNORE_INDEX, Predicted, TokenScores, predicted, score_tokens
from moka_pl.training.accidents.memory import check_halving, memory_errors
from moka_pl.training.accidents.micro_batches import MicroBatches
from moka_pl.training.accidents.naming import row_texts
from moka_pl.training.accidents.non_finite import NonFiniteSteps
from moka_pl.training.accidents.spikes import LossSpikes, SpikeOptions
from moka_pl.training.launches import HostCopy, KeptObjects
from moka_pl.training.learning_rates import LearningRateRatios, logged_rates
from moka_pl.training.sharding.strategy import ShardedStrategy
from moka_pl.training.step_log import StepLog


class TrainedModule(EvaluatedModule):
    """A causal language model that is trained on labelled tokens.

    Args:
        learning_rate_ratios: Multiples of the optimizer's learning rate, to be logged.
        cuda_graphs: Whether to replay steps as CUDA graphs.
        max_non_finite_steps: So many steps in a row that are not finite end the run.
        spikes: Which losses are spikes, and what is done about them.
        halves_batches: Whether to compute micro-batches in parts where the memory does not hold them.

    Attributes:
        updating: Whether the optimizer may be in the middle of changing the weights.
        describe_memory: Describes what rows, their tokens and predicted tokens take, where it is known.
    """

    gradient_checkpointing: bool | Literal["offload"]
    describe_memory: Callable[[int, int, int], str] | None = None

    def __init__(
        self,
        learning_rate_ratios: LearningRateRatios,
        cuda_graphs: bool,
        max_non_finite_steps: int,
        spikes: SpikeOptions,
        halves_batches: bool,
    ) -> None:
        super().__init__()
        self.learning_rate_ratios = replace(learning_rate_ratios)
        self.cuda_graphs = cuda_graphs
        self.halves_batches = halves_batches
        self.updating = False
        self._spikes = LossSpikes(self, spikes)
        self._non_finite = NonFiniteSteps(self, max_non_finite_steps, self._spikes)
        self._micro_batches: MicroBatches | None = None
        self._batch: Batch | None = None
        self._step_log = StepLog(self)
        self._accidents: dict[str, Any] = {}  # of the run that is resumed
        self._token_accumulator: Tensor | None = None
        self._packed: PackedAttention | None = None
        self._capture: StepCapture | None = None

    def configure_callbacks(self) -> list[Callback]:
        """Returns what logs the steps, and what keeps them from being interrupted, if it is not there yet."""
        known = self._step_log in self.trainer.callbacks  # type: ignore[attr-defined]
        return [] if known else [self._step_log, KeptObjects()]

    def _begin_steps(self) -> None:
        """Resets what is kept from step to step, or goes on from what a checkpoint has of it."""
        dtype = torch.float64 if self.device.type == "cpu" else torch.float32
        self._token_accumulator = torch.zeros(2, dtype=dtype, device=self.device)
        self._non_finite.begin()
        self.updating = False
        self._micro_batches = MicroBatches(self) if self.halves_batches else None
        stored, self._accidents = self._accidents, {}
        if stored:
            self._non_finite.in_a_row = stored["skipped"]
            self._spikes.load_state_dict(stored["spikes"])
            if self._micro_batches is not None:
                self._micro_batches.load_state_dict(stored["halved"])
        if self.backbone.compile == "layers":
            rank_zero_info(f"compiling {compile_layers(self.causal_lm)} decoder layers in the first steps")
        if self.backbone.matmul == "fp8" and (merged := count_merged(self.causal_lm)):
            rank_zero_info(f"not in 8 bits: {merged} adapted layers whose W + ΔW is one matrix")
        if self.cuda_graphs:
            self._capture = StepCapture(self.causal_lm)
            if self._capture.unsupported_reason is not None and self.device.type == "cuda":
                rank_zero_info(f"no CUDA graphs: {self._capture.unsupported_reason}")

    def accidents_state(self) -> dict[str, Any]:
        """Returns what of earlier steps decides how the next ones are judged and computed."""
        if self.trainer.state.fn != "fit":
            return {}
        self._non_finite.settle()
        halved = {} if self._micro_batches is None else self._micro_batches.state_dict()
        skipped = self._non_finite.in_a_row
        return {"spikes": self._spikes.state_dict(), "halved": halved, "skipped": skipped}

    def _check_steps(self) -> None:
        """Refuses what goes with other precisions or strategies only."""
        check_halving(self)
        self._spikes.check()

    def _check_backbone(self) -> None:
        """Refuses ways to compute the base that this machine or the trainer's options do not allow."""
        if self.backbone.compile == "layers":
            self._check_compiled()
        if self.backbone.matmul == "fp8":
            device = self.trainer.strategy.root_device
            if self.backbone.compile == "layers":
                raise ConfigError(
                    "backbone.compile layers does not go with backbone.matmul fp8; set one only"
                )
            if "mixed" in (precision := str(self.trainer.precision)):
                raise ConfigError(
                    f"trainer.precision {precision} does not go with backbone.matmul fp8; set "
                    "--trainer.precision 32-true"
                )
            check_float8(device, compute_dtype(self.backbone, device), self.backbone.quantization)

    def _check_compiled(self) -> None:
        """Refuses to compile without a compiler, or what hooks move while a layer computes.

        A graph would hold on to it.
        """
        check_compiler(self.trainer.strategy.root_device)
        offloads = self.gradient_checkpointing == "offload"
        if offloads or isinstance(self.trainer.strategy, ShardedStrategy):
            option = "gradient_checkpointing is offload" if offloads else "trainer.strategy is sharded"
            raise ConfigError(
                f"{option}, which does not go with backbone.compile layers; set --model.backbone.compile none"
            )

    def on_train_end(self) -> None:
        """Frees the CUDA graphs, and ends a run with an error if its weights are not finite."""
        self._capture = self._micro_batches = self._batch = None
        restore_layers(self.causal_lm)
        self._non_finite.finish()

    def prepare_batch(self, batch: Batch) -> Batch:
        """Prepares a batch while it is still on the CPU; the data modules of this package call it.

        What is made for a GPU lies in pinned memory, which is copied there while the CPU goes on.
        """
        if not self.trainer.training:
            return batch
        batch = self._fixed(batch)
        if self.device.type != "cuda" or batch["labels"].is_cuda or "item" in batch or "fixed" in batch:
            return batch
        batch = batch.copy()
        batch["predicted"] = Predicted(*(tensor.pin_memory() for tensor in predicted(batch["labels"])))
        return batch

    def _fixed(self, batch: Batch) -> Batch:
        """Adds the batch in a size that can be recorded; on a GPU the GPU would have to be waited for."""
        if self._capture is None or self._capture.unsupported_reason is not None:
            return batch
        if "item" in batch or "fixed" in batch:
            return batch
        if "position_ids" in batch and self._prepare_packing().unsupported_reason is not None:
            return batch
        fixed = fix_size(batch)
        if self.device.type == "cuda" and not batch["labels"].is_cuda:
            fixed = fixed.pinned()
        batch = batch.copy()
        batch["fixed"] = fixed
        return batch

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Returns the summed negative log-likelihood of the micro-batch's completion tokens.

        The division by the number of tokens happens once the whole batch of the optimizer step is known.
        """
        batch = self._batch = self._fixed(batch)  # where the data module did not
        with memory_errors(self, "the forward pass", batch):
            total, tokens = self._summed_loss(batch, batch_idx)
        assert self._token_accumulator is not None
        self._non_finite.add(batch)
        self._token_accumulator[0] += total.detach()
        self._token_accumulator[1] += tokens
        return total

    def _summed_loss(self, batch: Batch, batch_idx: int) -> tuple[Tensor, int]:
        """Returns the summed loss of a micro-batch, and the number of its tokens."""
        if self._micro_batches is not None:
            first = batch_idx % self.trainer.accumulate_grad_batches == 0
            return self._micro_batches.compute(batch, first)
        if "fixed" in batch:
            assert self._capture is not None
            return self._capture(batch["fixed"]), batch["fixed"].tokens
        scores = self.token_scores(batch)
        return scores.nll.sum(), scores.nll.numel()

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Computes the gradient of a micro-batch, or adds that which its parts have."""
        if self._micro_batches is not None:
            return self._micro_batches.add_gradients()
        with memory_errors(self, "the backward pass", self._batch):
            return super().backward(loss, *args, **kwargs)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Computes the last micro-batch of a step and updates the weights."""
        with memory_errors(self, "the optimizer's step", self._batch):
            super().optimizer_step(*args, **kwargs)
        self.updating = False

    def token_scores(self, batch: Batch) -> TokenScores:
        """Scores the completion tokens of a micro-batch, as training does."""
        packed = self._prepare_packing().inputs(batch) if "position_ids" in batch else {}
        labels = batch["predicted"] if "predicted" in batch else batch["labels"]
        return score_tokens(self.causal_lm, batch["input_ids"], labels, **packed)

    def single_rows(self, batch: Batch) -> list[Batch]:
        """Returns the rows of a batch that train something, each as a batch; packed ones together."""
        if "position_ids" in batch:
            return [batch]
        return [
            {"input_ids": ids[None], "labels": labels[None]}
            for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True)
            if (labels[1:] != IGNORE_INDEX).any()
        ]

    def named_rows(self, batch: Batch, scored: list[int]) -> list[str]:
        """Returns the rows of scored tokens, each once, in words: its beginning, and what stands there.

        Args:
            batch: The batch.
            scored: Numbers of the tokens among those of :meth:`token_scores`.
        """
        return row_texts(self, batch, scored)

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
            if self._micro_batches is not None:
                self._micro_batches.sum_over_ranks()
        total, tokens = sums[0], sums[1].clamp(min=1)
        loss = (total / tokens).float()
        factor = self.trainer.world_size * self.trainer.accumulate_grad_batches / tokens
        gradients = [p.grad for p in self.parameters() if p.grad is not None]
        multiply_all_(gradients, factor.to(torch.float32))
        norm = torch.nn.utils.get_total_norm(gradients)
        self._token_accumulator.zero_()
        rates = logged_rates(optimizer, self.learning_rate_ratios)
        # For callbacks; loggers and the progress bar get them when they are there.
        self.log("train/loss", loss, logger=False)
        self.log("train/grad_norm", norm, logger=False)
        for name, rate in rates.items():
            # A number would be copied to the GPU, for which the CPU waits.
            self.log(name, torch.as_tensor(rate, dtype=torch.get_default_dtype()), logger=False)
        values = torch.stack([loss, norm.to(loss.device).float()])
        copy = HostCopy(values)
        self._step_log.add(copy, rates)
        self._non_finite.check(optimizer, values, copy)

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *clip: Any, **clipping: Any
    ) -> None:
        """Clips the gradients, where the step has any."""
        if not self._non_finite.skipping:
            super().configure_gradient_clipping(optimizer, *clip, **clipping)
        self.updating = True  # Lightning's last hook before the optimizer's update

    def on_train_batch_end(self, *of_batch: Any) -> None:
        """Ends a run whose steps are no longer finite."""
        self._non_finite.raise_error()
