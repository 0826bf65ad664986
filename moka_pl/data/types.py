"""The contract between data modules, the LightningModule and the callbacks: batches, and what each offers.

A batch is a dictionary of one of three kinds, distinguished by their keys: plain rows, packed rows
(``position_ids``) and multiple choice (``item``).
"""

from collections.abc import Mapping, Sequence
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, final, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

from moka_pl.data.encoding.report import EncodingReport
from moka_pl.lm.cuda_graphs import FixedBatch
from moka_pl.lm.scoring import Predicted
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Sources that a model card names before it counts the rest.
_NAMED = 4


class TokenBatch(TypedDict):
    """Fields of all batches; other data modules and plain dataloaders need only the two tensors.

    There is no attention mask: causal attention never sees padding on the right.

    Attributes:
        input_ids: Token ids, padded on the right, shape (B, T), int64.
        labels: The ids to predict at their own positions, ``IGNORE_INDEX`` elsewhere, shape (B, T), int64.
        num_tokens: Real tokens, without padding and fillers.
        num_examples: Real examples, without fillers.
        predicted: The tokens that have a label, where they were found on the CPU.
        rows: Numbers of the real training examples, in their order, among the encoded ones.
        fixed: The batch padded to a size that CUDA graphs are captured for.
    """

    input_ids: Tensor
    labels: Tensor
    num_tokens: NotRequired[int]
    num_examples: NotRequired[int]
    predicted: NotRequired[Predicted]
    rows: NotRequired[list[int]]
    fixed: NotRequired[FixedBatch]


@final
class PlainBatch(TokenBatch):
    """One example per row.

    Attributes:
        words: Words of plain text that the batch holds.
        bytes: Its UTF-8 bytes.
    """

    words: NotRequired[int]
    bytes: NotRequired[int]


@final
class PackedBatch(TokenBatch):
    """Several examples per row; the first token of an example has no label.

    Attributes:
        position_ids: Restart at each example and at the padding, shape (B, T), int64.
        segment_starts: Where the S examples and paddings begin in the flattened batch, and its size, shape
            (S + 1,), int32.
        longest_segment: Number of tokens in the longest segment.
    """

    position_ids: Tensor
    segment_starts: Tensor
    longest_segment: int


class SharedPrompts(TypedDict):
    """One row per item, ``[prompt][option 1][option 2]...``, and the position that predicts each token.

    The last token of an option predicts nothing and is left out of the row, so an option of one token takes
    no room. All tensors are int64.

    Attributes:
        input_ids: Token ids, padded on the right, shape (I, S).
        position_ids: Restart after the prompt for every option, shape (I, S).
        segments: 0 for the prompt, k for option k, -1 for padding, shape (I, S); absent where no option has a
            token in the rows, so that plain causal attention does.
        predictor_row: Row of each of the P positions that predict something, shape (P,).
        predictor_column: Its column, shape (P,).
        predictor: For every scored token, the index of the position that predicts it, shape (N,).
        target: Its token id, shape (N,).
        option: The row of the whole batch that it belongs to, shape (N,).
    """

    input_ids: Tensor
    position_ids: Tensor
    segments: NotRequired[Tensor]
    predictor_row: Tensor
    predictor_column: Tensor
    predictor: Tensor
    target: Tensor
    option: Tensor


class Questions(TypedDict):
    """Prompts padded on the left, for generation.

    Attributes:
        input_ids: Token ids, shape (I, T), int64.
        attention_mask: 0 at the padding, shape (I, T), int64.
    """

    input_ids: Tensor
    attention_mask: Tensor


@final
class ChoiceBatch(TokenBatch):
    """Multiple-choice items, one option per row; labels cover only the option.

    Attributes:
        item: Index of the row's item in this batch, shape (B,), int64.
        task: Number of the item's task in its evaluation set, -1 for fillers, shape (B,), int64.
        option_chars: Characters of the option, shape (B,), int64.
        is_answer: Whether the option is the right one, shape (B,), bool; never for fillers.
        shared: The same items with each prompt once, if that takes fewer tokens with padding.
        questions: The prompts of the I items, if answers are generated.
        answer_names: Name of the right answer of each of the I items; empty for fillers.
    """

    item: Tensor
    task: Tensor
    option_chars: NotRequired[Tensor]
    is_answer: Tensor
    shared: NotRequired[SharedPrompts]
    questions: NotRequired[Questions]
    answer_names: NotRequired[list[str]]


Batch = PlainBatch | PackedBatch | ChoiceBatch
EvalBatch = PlainBatch | ChoiceBatch


class DataDefaults:
    """What a data module provides to the LightningModule and the callbacks; data modules may inherit from it.

    Plain dataloaders and other data modules get the defaults: one evaluation set without tasks, no packing.

    Attributes:
        packing: Whether training rows hold several examples.
        generated_tokens: Most tokens of a generated answer; 0 generates none.
        prompt: Name of the prompt that the examples are written in, if there is one for all of them.
        report: What became of the examples, by split.
    """

    packing: bool = False
    generated_tokens: int = 0
    prompt: str | None = None
    report: Mapping[str, EncodingReport] = MappingProxyType({})

    @property
    def batch_order(self) -> Mapping[str, object]:
        """What decides the training batches, by option; checkpoints hold it."""
        return {}

    @property
    def source(self) -> str:
        """What the data are called in model cards: class, and files, folders without those above, or hub ids.

        It is empty where nothing is known.
        """
        path = getattr(self, "path", None)
        if path is None:
            return ""
        paths = [path] if isinstance(path, str | PathLike) else list(path)
        names = [expanded(each).name if expanded(each).exists() else str(each) for each in paths[:_NAMED]]
        more = f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else ""
        return f"{type(self).__name__}: {', '.join(names)}{more}"

    @property
    def validation_digest(self) -> str | None:
        """A hash of the validation rows, if there are any that are known."""
        return None

    @property
    def eval_sets(self) -> Sequence[tuple[str, Sequence[str]]]:
        """(name, tasks) of each validation or test dataloader, in order; no tasks for plain text."""
        return [("data", [])]

    @property
    def task_groups(self) -> Mapping[str, Sequence[str]]:
        """Groups of tasks that are also reported together, by name."""
        return {}

    @property
    def reports(self) -> Sequence[tuple[str, str, EncodingReport]]:
        """Encoding reports of all parts of the data, as (name, split, report)."""
        name = str(getattr(self, "name", "data"))
        return [(name, split, report) for split, report in self.report.items()]


def data_of(trainer: Trainer) -> DataDefaults:
    """The trainer's data module, or the defaults."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, DataDefaults) else DataDefaults()


@runtime_checkable
class HasEpochs(Protocol):
    """A data module that knows how long its epochs are.

    Attributes:
        streaming: Whether it reads the training data during training, and so does not know it.
    """

    streaming: bool

    def epoch_length(self) -> int:
        """Returns the number of batches of an epoch, for every rank; the data must be set up."""


@runtime_checkable
class HasTokenizer(Protocol):
    """What data modules need of a LightningModule."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """A fast tokenizer."""


@runtime_checkable
class ModuleProtocol(HasTokenizer, Protocol):
    """What the package's LightningModule provides to the data modules."""

    @property
    def adapter_prompt(self) -> str | None:
        """The prompt that a loaded adapter was trained with, if known."""

    def prepare_batch(self, batch: Batch) -> Batch:
        """Prepares a batch while it is still on the CPU."""
