"""The contract between data modules, the LightningModule and the callbacks: batches, and what each offers.

A batch is a dictionary of one of three kinds, told apart by their keys: plain rows, packed rows
(``position_ids``) and multiple choice (``item``).
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, NotRequired, Protocol, TypedDict, final, runtime_checkable

from lightning.pytorch import Trainer
from torch import Tensor

from moka_pl.data.encoding.report import EncodingReport
from moka_pl.lm.cuda_graphs import FixedBatch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TokenBatch(TypedDict):
    """What all batches have; batches of other data modules and plain loaders need the two tensors only.

    There is no attention mask: padding stands on the right, where causal attention never looks.

    Attributes:
        input_ids: Token ids, padded on the right, shape (B, T), int64.
        labels: The ids to predict at their own positions, ``IGNORE_INDEX`` elsewhere, shape (B, T), int64.
        num_tokens: Real tokens, without padding and fillers.
        num_examples: Real examples, without fillers.
    """

    input_ids: Tensor
    labels: Tensor
    num_tokens: NotRequired[int]
    num_examples: NotRequired[int]


@final
class PlainBatch(TokenBatch):
    """One example a row.

    Attributes:
        words: Words of plain text that the batch holds.
        bytes: Its UTF-8 bytes.
        fixed: The batch in a size that CUDA graphs can be recorded for.
    """

    words: NotRequired[int]
    bytes: NotRequired[int]
    fixed: NotRequired[FixedBatch]


@final
class PackedBatch(TokenBatch):
    """Several examples a row, one after another; the first token of an example has no label.

    Attributes:
        position_ids: Begin anew with every example and with the padding, shape (B, T), int64.
        segment_starts: Where the S examples and paddings begin in the flattened batch, and its size, shape
            (S + 1,), int32.
        longest_segment: Tokens of the longest of them.
    """

    position_ids: Tensor
    segment_starts: Tensor
    longest_segment: int


class SharedPrompts(TypedDict):
    """One row an item, ``[prompt][option 1][option 2]...``, and which position predicts which token.

    The last token of an option predicts nothing, so it is no part of its row; an option of a single token
    takes no room at all. All tensors are int64.

    Attributes:
        input_ids: Token ids, padded on the right, shape (I, S).
        position_ids: Begin again after the prompt for every option, shape (I, S).
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
    """Prompts padded on the left, where generation goes on from their ends.

    Attributes:
        input_ids: Token ids, shape (I, T), int64.
        attention_mask: 0 at the padding, shape (I, T), int64.
    """

    input_ids: Tensor
    attention_mask: Tensor


@final
class ChoiceBatch(TokenBatch):
    """Multiple-choice items, one option a row; the labels cover the tokens of the option only.

    Attributes:
        item: Index of the row's item in this batch, shape (B,), int64.
        task: Number of the item's task in its evaluation set, -1 for fillers, shape (B,), int64.
        option_chars: Characters of the option, shape (B,), int64.
        is_answer: Whether the option is the right one, shape (B,), bool; never for fillers.
        shared: The same items with their prompts once, where that takes fewer tokens with padding.
        questions: The prompts of the I items, where answers are generated.
        answer_names: What the right answer of each of the I items is called; empty for fillers.
    """

    item: Tensor
    task: Tensor
    option_chars: Tensor
    is_answer: Tensor
    shared: NotRequired[SharedPrompts]
    questions: NotRequired[Questions]
    answer_names: NotRequired[list[str]]


Batch = PlainBatch | PackedBatch | ChoiceBatch
EvalBatch = PlainBatch | ChoiceBatch


class DataDefaults:
    """What a data module offers to module and callbacks; those that offer more than this inherit from it.

    The defaults hold for plain loaders and other people's data modules: one evaluation set without tasks, no
    packing.

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
    def eval_sets(self) -> Sequence[tuple[str, Sequence[str]]]:
        """(name, tasks) of every validation or test dataloader, in their order; no tasks for plain text."""
        return [("data", [])]

    @property
    def task_groups(self) -> Mapping[str, Sequence[str]]:
        """Tasks that are reported together, too, by the name of the group."""
        return {}

    @property
    def reports(self) -> Sequence[tuple[str, EncodingReport]]:
        """What became of the examples of every part of the data, as (split, report)."""
        return list(self.report.items())


def data_of(trainer: Trainer) -> DataDefaults:
    """The trainer's data module; the defaults for plain loaders and data modules that offer nothing."""
    data = trainer.datamodule  # type: ignore[attr-defined]
    return data if isinstance(data, DataDefaults) else DataDefaults()


@runtime_checkable
class HasTokenizer(Protocol):
    """The least that data modules ask of a LightningModule."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """A fast tokenizer."""


@runtime_checkable
class ModuleProtocol(HasTokenizer, Protocol):
    """What the package's LightningModule offers to the data modules."""

    @property
    def adapter_prompt(self) -> str | None:
        """The prompt that the adapter was trained with, where an adapter was loaded that tells it."""

    def prepare_batch(self, batch: Batch) -> Batch:
        """What is done with a batch while it is still on the CPU."""
