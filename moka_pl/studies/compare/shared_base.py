"""One frozen base that adapters are put into and taken out of again, and the module that trains on it."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moka_pl._compat import attention_implementation
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.load import Backbone
from moka_pl.data.types import Batch, EvalBatch, PlainBatch
from moka_pl.evaluation.metrics import ItemTable
from moka_pl.evaluation.results import Counts, Results, SetCounts
from moka_pl.inference import generate_texts
from moka_pl.lm.scoring import IGNORE_INDEX, TokenScores, row_sums
from moka_pl.studies.common import free_memory, structure
from moka_pl.studies.reasoning import is_right
from moka_pl.training.module import MokaModule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


Checksums = list[int]

#: Whole numbers by their size in bytes.
_WHOLE = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass
class _Loaded:
    backbone: Backbone
    children: list[tuple[nn.Module, dict[str, nn.Module | None]]]
    structure: list[tuple[object, ...]]
    checksums: Checksums
    attention: str | None


class SharedBase:
    """Loads a base once, for as long as runs ask for the same one and leave it as it was."""

    def __init__(self) -> None:
        self._config: BackboneConfig | None = None
        self._loaded: _Loaded | None = None
        self.loads = 0

    def get(self, config: BackboneConfig, device: torch.device | str) -> Backbone:
        """The base, on a device, frozen and without adapters.

        Args:
            config: Which base; another one than before takes its place.
            device: Where it is wanted.
        """
        if self._loaded is None or self._config != config:
            self.drop()
            backbone = load_backbone(config, device)
            model = backbone.model
            self._config = config
            self._loaded = _Loaded(
                backbone,
                [(module, dict(module.named_children())) for module in model.modules()],
                structure(model),
                checksums(model),
                attention_implementation(model),
            )
            self.loads += 1
        self._loaded.backbone.model.to(device)
        return self._loaded.backbone

    def restore(self) -> bool:
        """Takes out whatever a run put in.

        The layers that adapters took the place of are put back; if the model then still differs in a module,
        a hook, a parameter or its attention, it is given up and loaded again for the next run.

        Returns:
            Whether the base is as it was.
        """
        if self._loaded is None:
            return False
        loaded, model = self._loaded, self._loaded.backbone.model
        for module, children in loaded.children:
            for name in dict(module.named_children()).keys() - children.keys():
                delattr(module, name)
            for name, child in children.items():
                setattr(module, name, child)
        vars(model).pop("peft_config", None)  # of PEFT's methods, which warn of it when they find it
        model.requires_grad_(False)
        model.zero_grad(set_to_none=True)
        if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
            model.gradient_checkpointing_disable()
        if attention_implementation(model) != loaded.attention:
            model.set_attn_implementation(loaded.attention)
        model.eval()
        clean = structure(model) == loaded.structure and checksums(model) == loaded.checksums
        if not clean:
            self.drop()
        return clean

    def drop(self) -> None:
        """Gives the model's memory back."""
        self._loaded = self._config = None
        free_memory()


@torch.no_grad()
def checksums(model: "PreTrainedModel") -> Checksums:
    """A sum of the bits of every parameter, which any training changes, shape (parameters,).

    Whole numbers, added where the parameters are: their order does not matter, and one copy brings them all.
    """
    return torch.stack([_sum(parameter) for parameter in model.parameters()]).tolist()


def _sum(tensor: Tensor) -> Tensor:
    whole = _WHOLE[tensor.element_size()]
    return tensor.detach().contiguous().view(whole).sum(dtype=torch.int64)


class ComparedModule(MokaModule):
    """A :class:`MokaModule` whose base is shared with other runs.

    Attributes:
        shared: Where the base comes from; None loads one.
        base_device: Device of the base; None is the module's, which without a trainer is the CPU.
        batches: Digest of all training batches in their order, so that runs can be seen to have had the same.
        items: What every item of the last evaluation scored, in the order of the evaluation.
        max_new_tokens: Most tokens of an answer that the model generates to each of the test's instructions,
            which counts where :func:`~moka_pl.studies.reasoning.is_right` says so; 0 generates none.
        answer_tasks: A name for each of the test's sets of instructions; empty for the sets' own.
    """

    shared: SharedBase | None = None
    base_device: torch.device | None = None
    items: dict[str, list[Any]] | None = None
    max_new_tokens: int = 0
    answer_tasks: Sequence[str] = ()
    _digest: Any = None

    def load_base(self) -> Backbone:
        """The shared base."""
        if self.shared is None:
            return super().load_base()
        return self.shared.get(self.backbone, self.base_device or self.device)

    def on_train_start(self) -> None:
        """Begins with no counted batches, too."""
        super().on_train_start()
        self._digest = hashlib.sha256()

    @property
    def batches(self) -> str:
        """Digest of the batches trained on."""
        assert self._digest is not None
        return str(self._digest.hexdigest())[:16]

    def prepare_batch(self, batch: Batch) -> Batch:
        """Notes a training batch, while it is still on the CPU."""
        if self.trainer.training and self._digest is not None:  # not those that a start is chosen by
            self._digest.update(batch["input_ids"].cpu().numpy().tobytes())
        return super().prepare_batch(batch)

    def _start_metrics(self) -> None:
        super()._start_metrics()
        assert self._metrics is not None
        self._metrics.items = []
        self._plain: list[Tensor] = []
        self._answered: list[Tensor] = []

    def test_step(self, batch: EvalBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds a batch to the metrics, and has the model answer its instructions where that is wanted.

        Args:
            batch: Labelled rows, or multiple-choice items.
            batch_idx: Unused.
            dataloader_idx: Number of the evaluation set.
        """
        super().validation_step(batch, batch_idx, dataloader_idx)
        if self.max_new_tokens and "item" not in batch:
            right = self._answers_right(batch)  # (B,)
            self._answered.append(torch.stack([torch.full_like(right, dataloader_idx), right], 1))  # (B, 2)

    def _answers_right(self, batch: PlainBatch) -> Tensor:
        """Whether the model's own answer to each row's prompt is right, shape (B,)."""
        ids, mask, answers = asked(batch, self.tokenizer)

        def generate(part: slice) -> list[str]:
            return generate_texts(self.causal_lm, self.tokenizer, ids[part], mask[part], self.max_new_tokens)

        told = chain.from_iterable(self._answers.parts(len(ids), generate))
        return torch.tensor([int(is_right(one, right)) for one, right in zip(told, answers, strict=True)])

    def _score(self, batch: EvalBatch) -> TokenScores:
        scores = super()._score(batch)
        if "item" not in batch:
            rows = len(batch["input_ids"])
            tokens = torch.bincount(scores.row, minlength=rows)  # (B,)
            self._plain.append(torch.stack([row_sums(scores, rows).double(), tokens.double()], 1))  # (B, 2)
        return scores

    def _end_metrics(self, prefix: str) -> None:
        super()._end_metrics(prefix)
        assert self._metrics is not None
        sets = self._metrics.sets
        self.items = columns(self._metrics.items or [], self._plain, [tasks for _, tasks in sets])
        if self._answered:
            names = list(self.answer_tasks) or [name for name, _ in sets]
            self.items |= answer_columns(self._plain, self._answered, names)
            self.eval_results = Results([SetCounts("answers", counts_by_task(self.items))])
        self._metrics.items, self._plain, self._answered = None, [], []


def asked(batch: PlainBatch, tokenizer: "PreTrainedTokenizerBase") -> tuple[Tensor, Tensor, list[str]]:
    """What a model is to answer: the prompts of instructions, and the right answers.

    Args:
        batch: B rows of a prompt and its labelled answer, padded on the right.
        tokenizer: The tokenizer.

    Returns:
        Prompts padded on the left, shape (B, T), their mask, shape (B, T), and the B answers without special
        tokens; of a filler its first token, and an empty answer.
    """
    ids, labelled = batch["input_ids"], batch["labels"] != IGNORE_INDEX  # (B, T)
    starts = torch.where(labelled.any(1), labelled.int().argmax(1), 1).tolist()  # (B,)
    width, pad = max(starts), tokenizer.pad_token_id or 0
    prompts = torch.stack(
        [F.pad(row[:n], (width - n, 0), value=pad) for row, n in zip(ids, starts, strict=True)]
    )
    columns = torch.arange(width, device=ids.device)  # (T,)
    mask = (columns >= width - torch.tensor(starts, device=ids.device)[:, None]).long()  # (B, T)
    answers = [row[chosen] for row, chosen in zip(ids, labelled, strict=True)]
    return prompts, mask, list(tokenizer.batch_decode(answers, skip_special_tokens=True))


def answer_columns(plain: list[Tensor], answered: list[Tensor], names: list[str]) -> dict[str, list[Any]]:
    """``task``, ``correct`` and ``correct_norm`` of generated answers.

    Args:
        plain: Summed negative log-likelihood and tokens of the right answers, by batch, (B, 2) each.
        answered: Number of the set, and whether the answer is right, by batch, (B, 2) each.
        names: Names of the sets.
    """
    real = torch.cat([rows[:, 1] > 0 for rows in plain]).cpu()  # (N,)
    kept = torch.cat(answered)[real].tolist()
    right = [int(one) for _, one in kept]
    return {"task": [names[number] for number, _ in kept], "correct": right, "correct_norm": right}


def counts_by_task(items: dict[str, list[Any]]) -> dict[str, Counts]:
    """Sums of the items' columns by task."""
    counts: dict[str, Counts] = {}
    for task, right, nll, tokens in zip(
        *(items[n] for n in ("task", "correct", "nll", "tokens")), strict=True
    ):
        counts[task] = counts.get(task, Counts()) + Counts(1, right, right, nll=nll, tokens=tokens)
    return counts


def columns(choices: list[ItemTable], plain: list[Tensor], sets: list[list[str]]) -> dict[str, list[Any]]:
    """Lists by name, with an element an item.

    Args:
        choices: Multiple-choice items, by batch.
        plain: Summed negative log-likelihood and tokens of plain texts, by batch, (B, 2) each.
        sets: Names of the tasks of every evaluation set.

    Returns:
        ``task`` (empty for plain text), ``correct``, ``correct_norm``, ``nll`` (nats) and ``tokens``;
        fillers (texts without a token) are left out.
    """
    names = list(Counts.__dataclass_fields__)
    table: dict[str, list[Any]] = {"task": [], "correct": [], "correct_norm": [], "nll": [], "tokens": []}
    for batch in choices:
        table["task"] += [sets[batch.set][task] for task in batch.task.tolist()]
        for name in ("correct", "correct_norm", "tokens"):
            table[name] += batch.counts[:, names.index(name)].int().tolist()
        table["nll"] += [round(value, 5) for value in batch.counts[:, names.index("nll")].tolist()]
    for rows in plain:
        kept = rows[rows[:, 1] > 0]
        table["task"] += [""] * len(kept)
        table["nll"] += [round(value, 5) for value in kept[:, 0].tolist()]
        table["tokens"] += kept[:, 1].int().tolist()
    return table
