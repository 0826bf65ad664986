"""The evaluating half of the LightningModule: validation, test and prediction."""

import warnings
from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from moka_pl.backbone import BackboneConfig
from moka_pl.data.types import DataDefaults, EvalBatch, data_of
from moka_pl.evaluation.memory import Halving, OutOfMemoryError
from moka_pl.evaluation.metrics import EvalMetrics
from moka_pl.evaluation.results import Results
from moka_pl.evaluation.shared_prompt import can_share, fits_window, score_shared, select_items
from moka_pl.inference import generate_texts, named_option
from moka_pl.lm.scoring import TokenScores, row_sums, score_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class EvaluatedModule(LightningModule):
    """A causal language model that is evaluated on labelled tokens and on multiple choice.

    Attributes:
        backbone: The base model.
        tokenizer: Its tokenizer.
        eval_values: Values of the last evaluation, by the name under which they were logged.
        eval_step: The optimizer step that they belong to.
        eval_results: The last evaluation in full.
        recalled: Results that are known; the next evaluation computes nothing, and gives these.
    """

    backbone: BackboneConfig
    tokenizer: "PreTrainedTokenizerBase"

    def __init__(self) -> None:
        super().__init__()
        self.eval_values: dict[str, float] = {}
        self.eval_step: int | None = None
        self.eval_results: Results | None = None
        self.recalled: Results | None = None
        self._metrics: EvalMetrics | None = None
        remedy = "Lower data.max_length, or free memory of the device"
        self._rows = Halving("rows", remedy)
        self._items = Halving("items", remedy)
        self._answers = Halving("generated answers", remedy)

    @property
    @abstractmethod
    def causal_lm(self) -> "PreTrainedModel":
        """The model with its adapters."""

    def on_validation_epoch_start(self) -> None:
        """Begins the metrics anew."""
        self._start_metrics()

    def validation_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics.

        Args:
            batch: Labelled rows, or multiple-choice items.
            batch_idx: Unused.
            dataloader_idx: Number of the evaluation set.
        """
        assert self._metrics is not None
        if self.recalled is not None:
            return
        scores = self._score(batch)
        if "item" not in batch:
            tokens = scores.nll.new_tensor(scores.nll.numel())
            words, size = batch.get("words", 0), batch.get("bytes", 0)
            self._metrics.update_loss(dataloader_idx, scores.nll.sum(), tokens, words=words, bytes=size)
            return
        answers = batch["is_answer"][scores.row]  # (N,)
        self._metrics.update_loss(dataloader_idx, (scores.nll * answers).sum(), answers.sum().float())
        options = len(batch["input_ids"])
        log_likelihood = -row_sums(scores, options)  # (B,)
        tokens = torch.bincount(scores.row, minlength=options)  # (B,)
        self._metrics.update_choices(dataloader_idx, log_likelihood, batch, tokens, self._generate(batch))

    on_test_epoch_start = on_validation_epoch_start
    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Logs the metrics as ``val/…``."""
        self._end_metrics("val")

    def on_test_epoch_end(self) -> None:
        """Logs the metrics as ``test/…``."""
        self._end_metrics("test")

    def predict_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        """Returns the ``log_likelihood`` of each row's completion; for multiple choice also each row's item.

        Args:
            batch: Labelled rows, or multiple-choice items, in B rows.
            batch_idx: Unused.
            dataloader_idx: Unused.
        """
        scores = self._score(batch)
        predicted: dict[str, Any] = {"log_likelihood": -row_sums(scores, len(batch["input_ids"]))}
        columns = ("item", "task", "is_answer", "option_chars")
        return predicted | {name: value for name, value in batch.items() if name in columns}

    def _start_metrics(self) -> None:
        data = data_of(self.trainer)
        sets = data.eval_sets or DataDefaults().eval_sets
        self._metrics = EvalMetrics(sets, self.device, data.task_groups)

    def _score(self, batch: EvalBatch) -> TokenScores:
        """Scores the labelled tokens; of options that share a prompt, where the model can, in one row."""
        ids, labels = batch["input_ids"], batch["labels"]
        if "shared" in batch and self._can_share and fits_window(self.causal_lm, ids.shape[1]):
            shared = batch["shared"]
            with suppress(OutOfMemoryError):  # alone, its options may fit
                return self._joined(
                    self._items,
                    len(shared["input_ids"]),
                    lambda part: score_shared(self.causal_lm, select_items(shared, part)),
                )

        def score(part: slice) -> TokenScores:
            nll, row = score_tokens(self.causal_lm, ids[part], labels[part])
            return TokenScores(nll, row + part.start)

        return self._joined(self._rows, len(ids), score)

    @staticmethod
    def _joined(halving: Halving, rows: int, score: Callable[[slice], TokenScores]) -> TokenScores:
        parts = halving.parts(rows, score)
        return parts[0] if len(parts) == 1 else TokenScores(*map(torch.cat, zip(*parts, strict=True)))

    @cached_property
    def _can_share(self) -> bool:
        shares = can_share(self.causal_lm)
        if not shares:
            rank_zero_info(
                f"{self.backbone.name} does not support custom attention masks; options are scored with "
                "their whole prompts"
            )
        return shares

    def _generate(self, batch: EvalBatch) -> Tensor | None:
        """Whether each item's generated answer is right, shape (I,); None where nothing is generated."""
        # While training goes on, the likelihoods have to do.
        if "questions" not in batch or self.trainer.state.fn == "fit":
            return None
        limit = data_of(self.trainer).generated_tokens
        if limit < 1:
            return None
        ids, mask = batch["questions"]["input_ids"], batch["questions"]["attention_mask"]

        def generate(part: slice) -> list[str]:
            return generate_texts(self.causal_lm, self.tokenizer, ids[part], mask[part], max_new_tokens=limit)

        answers = list(chain.from_iterable(self._answers.parts(len(ids), generate)))
        right = [
            named_option(answer) == name.lower()
            for answer, name in zip(answers, batch["answer_names"], strict=True)
        ]
        return torch.tensor(right, device=self.device)

    def _end_metrics(self, prefix: str) -> None:
        assert self._metrics is not None
        # Under some strategies ranks that have no more batches serve the others before they sum up.
        self.trainer.strategy.barrier()
        self.eval_results = self._metrics.compute() if self.recalled is None else self.recalled
        self.recalled = None
        self.eval_values = {f"{prefix}/{name}": value for name, value in self.eval_results.values().items()}
        self.eval_step = self.trainer.global_step
        shown = {f"{prefix}/loss", f"{prefix}/accuracy"}
        warnings.filterwarnings("ignore", f"It is recommended to use `self.log.'{prefix}/")
        for name, value in self.eval_values.items():
            # The values are the same on all ranks already, of which Lightning (2.6) warns, name by name.
            self.log(name, value, prog_bar=name in shown, sync_dist=False)
