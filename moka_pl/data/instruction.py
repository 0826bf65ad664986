"""Instructions and chats."""

from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_info

from moka_pl.data.base import SplitDataModule
from moka_pl.data.batching.order import Order
from moka_pl.data.batching.streaming import StreamedBatches, StreamedRecords, StreamLoader
from moka_pl.data.catalog import find_corpus
from moka_pl.data.encoding.examples import Encoded, SegmentEncoder
from moka_pl.data.formats.instruction import INSTRUCTION_FIELDS, instruction_features, parse_instruction
from moka_pl.data.formats.trees import TreePaths, join_trees
from moka_pl.data.reading import parse_columns, read_rows
from moka_pl.data.samples import sample_path
from moka_pl.data.sources import Shard, Sources, as_list, find_shards
from moka_pl.errors import DataError
from moka_pl.prompts.chats import beside_text, left_out
from moka_pl.prompts.ends import adds_bos
from moka_pl.prompts.segments import alpaca, chat, require_end, require_template
from moka_pl.prompts.templates import PromptName

if TYPE_CHECKING:
    from datasets import Dataset

    from moka_pl.data.batching.loader import ResumableDataLoader


EmptyAnswers = Literal["skip", "train"]
"""What becomes of answers without a text."""


class InstructionData(SplitDataModule):
    """Instructions with answers, and chats. The columns of a record determine its format.

    Formats of instructions:

    - ``instruction``, ``input`` (optional) and ``output`` (Alpaca)
    - ``instruction``, ``context`` and ``response`` (Dolly)
    - ``prompt`` with ``completion`` or ``response``, or ``inputs`` with ``targets`` (FLAN)

    Formats of chats:

    - ``messages`` with ``role`` (system, user, assistant, tool, ...), ``content`` (text, or a list of parts
      with ``type`` "text" and ``text`` or ``value``), an optional ``weight`` (0 skips the turn's loss), and
      whatever else the chat template takes, such as ``tool_calls``
    - ``conversations`` with ``from`` and ``value`` (ShareGPT)
    - ``prompt`` and ``completion`` that are lists of messages (TRL)
    - ``text`` with turns "### Human: ..." and "### Assistant: ..." (Guanaco)
    - flat messages with ``message_id``, ``parent_id``, ``role`` and ``text``, which form trees (OASST1)

    Rows of all formats may have ``system``, ``history`` (context only), ``tools`` and ``weight``. Unused
    fields are named once; what changes the meaning of a chat but is not rendered is refused.

    The validation data also serve as test data. Examples are encoded once and memory-mapped from disk, so
    they need not fit into memory. Stream them if encoding everything first would take too long, or if the
    disk cannot hold a second copy. A stream is shuffled only within a buffer. With several workers, stream
    several files.

    Args:
        path: A .json, .jsonl, .csv or .parquet file, a folder of such files, a hub dataset id, the name of a
            corpus on the hub (alpaca, alpaca_cleaned, dolly, flan, guanaco, oasst1, sharegpt, ultrachat), or
            a list of these; "sample" uses the package's own instructions and chats (with ``prompt: alpaca``,
            instructions only).
        validation_path: The same for validation. None uses the validation (else test) files of a folder, the
            split of a named corpus or the samples' held-out files; otherwise it holds out a share of the
            training data. With ``validation_share: 0``, None disables validation.
        split: Training split of a hub dataset; None uses "train", or the named corpus's equivalent.
        prompt: "chat" renders the tokenizer's chat template and trains on every assistant turn; "alpaca"
            writes the Alpaca prompt and trains on the answer. None uses the prompt that the model's adapter
            was trained with, else the named corpus's prompt, else "chat".
        columns: Mapping of fields to your columns (``{instruction: question, output: reply}``); other columns
            are ignored, and named.
        tree_paths: For message trees, "best" follows the best-ranked replies to one chat; "all" makes a chat
            of every path to a last reply.
        tree_language: For message trees, their language (``lang``); None keeps all.
        streaming: Read and encode the training data during training. It needs ``trainer.max_steps``, restarts
            the data at their end, and holds nothing out: give a validation_path, whose data are read whole.
        stream_buffer: Examples per device (and worker) that are shuffled, and sorted by length, together.
        empty_answers: "skip" does not train answers without text, and counts them; "train" teaches the model
            to answer nothing.
        append_eos: For chat templates that write no end-of-turn token after an answer, without which the
            model never learns to stop: true trains the tokenizer's end-of-sequence token there, false trains
            without one, None refuses the template. Other templates, and ``prompt: alpaca``, do not need it.
        **options: validation_share and separate_test (see SplitDataModule); batch_size, max_length,
            num_workers, num_proc, seed, bucket, eval_batch_size, packing, max_tokens (see MokaDataModule).

    Raises:
        DataError: An option is unknown or out of range, or streaming is combined with separate_test,
            packing or max_tokens.
    """

    name = "instruction"

    def __init__(
        self,
        path: Sources = "sample",
        validation_path: Sources | None = None,
        split: str | None = None,
        prompt: PromptName | None = None,
        columns: dict[str, str] | None = None,
        tree_paths: TreePaths = "best",
        tree_language: str | None = "en",
        streaming: bool = False,
        stream_buffer: int = 10_000,
        empty_answers: EmptyAnswers = "skip",
        append_eos: bool | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if prompt not in (None, "chat", "alpaca"):
            raise DataError(f"prompt must be 'chat' or 'alpaca', got {prompt!r}")
        if tree_paths not in ("best", "all"):
            raise DataError(f"tree_paths must be 'best' or 'all', got {tree_paths!r}")
        if empty_answers not in ("skip", "train"):
            raise DataError(f"empty_answers must be 'skip' or 'train', got {empty_answers!r}")
        if stream_buffer < self.batch_size:
            raise DataError(
                f"stream_buffer must be at least batch_size ({self.batch_size}), got {stream_buffer}"
            )
        if self.separate_test and streaming:
            raise DataError(
                "separate_test: true holds out training data, which streaming: true cannot; set one of "
                "them to false"
            )
        if streaming and (self.packing or self.max_tokens is not None):
            given = "packing: true" if self.packing else f"max_tokens: {self.max_tokens}"
            raise DataError(
                f"{given} needs the length of every example, which streaming: true does not know; leave one "
                "of them out"
            )
        self.streaming = streaming
        self.stream_buffer = stream_buffer
        self.path = path
        self.validation_path = validation_path
        self.split = split
        self.columns = parse_columns(columns, INSTRUCTION_FIELDS)
        self.empty_answers = empty_answers
        self.append_eos = append_eos
        self.tree_paths = tree_paths
        self.tree_language = tree_language
        self._prompt = prompt

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """Name of the prompt: the chosen one, else the adapter's, else the one that fits the corpus."""
        return self._resolve_prompt(self._prompt, get_args(PromptName), fitting_prompt(self.path))

    def prepare_data(self) -> None:
        """Encodes what the run needs; checks the first record of a stream."""
        fits = self.trainer is None or self.trainer.state.fn == "fit"
        if self.streaming and fits:
            self._check_prompt()
            self._stream_length()
            self._stream().check_first()
        super().prepare_data()

    def train_dataloader(self) -> "ResumableDataLoader | StreamLoader":  # type: ignore[override]
        """Shuffled batches; resumable in the middle of an epoch."""
        if not self.streaming:
            return super().train_dataloader()
        rank, world = self._rank_and_world()
        batches = StreamedBatches(
            self._stream(),
            self._encoder(),
            self.batch_size,
            self.stream_buffer,
            rank,
            world,
            seed=self.seed,
            bucket=self.bucket,
            pad_id=self.pad_id,
        )
        label = f"{self.name} train"
        rank_zero_info(f"{label}: streaming; the number of examples is unknown in advance")
        return StreamLoader(
            batches,
            self.num_workers,
            self._stream_length(),
            label,
            pin_memory=torch.cuda.is_available(),
            order=self.batch_order,
        )

    @property
    def batch_order(self) -> Order:
        """What decides the training batches, by option; see the base class."""
        if not self.streaming:
            return super().batch_order
        return super().batch_order | {
            "prompt": self.prompt,
            "empty_answers": self.empty_answers,
            "append_eos": self.append_eos,
            "stream_buffer": self.stream_buffer,
            "num_workers": self.num_workers,  # each has a position of its own
        }

    def _stream(self) -> StreamedRecords:
        return StreamedRecords(self._shards("train"), self.columns, self.seed)

    def _stream_length(self) -> int | None:
        """Batches of the whole run, per device; None without a trainer."""
        if self.trainer is None:
            return None
        if self.trainer.max_steps < 0:
            raise DataError(
                "streaming: true needs trainer.max_steps: the number of examples is unknown in advance, but "
                "the learning-rate schedule needs the length of the run. Set --trainer.max_steps (optimizer "
                "steps), or streaming: false"
            )
        return self.trainer.max_steps * self.trainer.accumulate_grad_batches

    def encode(self, split: str) -> Encoded | None:
        """Encodes a split, for ``"test"`` the validation data; a stream has no encoded training rows."""
        if self.streaming and split == "train":
            return None
        self._check_prompt()
        key = f"{self.prompt} {self.empty_answers} {self.append_eos}"
        return self._encode(split, self._split_rows(split), self._encoder(), key)

    def _check_prompt(self) -> None:
        """Refuses a tokenizer that has no use for the prompt, before anything is read."""
        if self.prompt == "chat":
            require_template(self.tokenizer)
            require_end(self.tokenizer, self.append_eos)

    def _encoder(self) -> SegmentEncoder:
        options: dict[str, Any] = {"skip_empty": self.empty_answers == "skip"}
        if self.prompt == "chat":
            options["tokenizer"] = self.tokenizer
        chats = partial(chat, append_eos=bool(self.append_eos))
        return SegmentEncoder(
            self.tokenizer,
            partial(chats if self.prompt == "chat" else alpaca, **options),
            self.max_length,
            bos=self.prompt != "chat" and adds_bos(self.tokenizer),
            left_out=partial(left_out if self.prompt == "chat" else beside_text, **options),
        )

    def _shards(self, split: str) -> list[Shard]:
        """The shards of the training data, or of the validation data (also used for tests)."""
        if split == "train":
            return self._training_shards()
        if self.validation_path is None:
            # The samples' own are so few and so near that nobody means to do without them.
            if self.path == "sample":
                return self._samples("heldout")
            return find_shards(self.path, "validation") if self.validation_share > 0 else []
        if self.validation_path == "sample":
            return self._samples("heldout")
        sources = as_list(self.validation_path)
        shards = [find_shards(s, "validation") or find_shards(s, "train", self.split) for s in sources]
        return [shard for group in shards for shard in group]

    def _training_shards(self) -> list[Shard]:
        shards = (
            self._samples("train") if self.path == "sample" else find_shards(self.path, "train", self.split)
        )
        if not shards:
            raise DataError(
                f"{self.path} has no training data. Name its training files train*, or give another path"
            )
        return shards

    def _samples(self, split: str) -> list[Shard]:
        kinds = ("instruction",) if self.prompt == "alpaca" else ("instruction", "chat")
        return [Shard(sample_path(f"{kind}_{split}")) for kind in kinds]

    def _read(self, shard: Shard) -> "Dataset":
        return read_rows(
            shard,
            parse_instruction,
            instruction_features(),
            columns=self.columns,
            gather=partial(join_trees, paths=self.tree_paths, language=self.tree_language),
        )


def fitting_prompt(path: Sources) -> PromptName:
    """The prompt of the named corpora in ``path``; "chat" if they disagree or there are none."""
    corpora = [find_corpus(source) for source in as_list(path)]
    prompts = {corpus.prompt for corpus in corpora if corpus is not None}
    return prompts.pop() if len(prompts) == 1 and None not in corpora else "chat"
