"""Instructions and chats."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moka_pl.data.base import MokaDataModule
from moka_pl.data.encode import Encoded, SegmentEncoder, adds_bos, encode_rows
from moka_pl.data.errors import DataError
from moka_pl.data.holdout import HoldOut
from moka_pl.data.instruction_rows import check_instruction, instruction_features
from moka_pl.data.prompts import PromptName, alpaca, chat, require_template
from moka_pl.data.reading import read_rows
from moka_pl.data.samples import sample_path
from moka_pl.data.trained_prompt import settle_prompt

if TYPE_CHECKING:
    from datasets import Dataset


class InstructionData(MokaDataModule):
    """Instructions with answers (Alpaca form) and chats (messages form), told apart record by record.

    Alpaca form: `instruction`, `input` (may be absent), `output`. Chat form: `messages`, each with `role`
    (system, user, assistant, tool), `content` (text, or a list of parts with `type` "text" and `text` or
    `value`) and, if wanted, `loss_weight` (0: this turn is not trained). Test data are the validation data.

    Args:
        path: A local .json, .jsonl, .csv or .parquet file, several of them, a hub data set id, or "sample"
            for the corpora that come with the package (instructions and chats; with `prompt: alpaca`
            instructions only).
        validation_path: The same for validation; None holds a share of the training data out (of the samples:
            takes their own held-out files).
        validation_share: Share of the examples to hold out where there is no validation_path; 0 trains
            without validation. Which ones depends on the data alone, not on the seed.
        split: Which split of a hub data set.
        prompt: "chat" renders the tokenizer's chat template and trains every assistant turn; "alpaca" writes
            the Alpaca prompt and trains the answer. None takes the prompt that the model's adapter was
            trained with, else "chat".
        **options: batch_size, max_length, num_workers, num_proc, seed, bucket, eval_batch_size (see
            MokaDataModule).
    """

    name = "instruction"

    def __init__(
        self,
        path: str | Path | list[str | Path] = "sample",
        validation_path: str | Path | list[str | Path] | None = None,
        validation_share: float = 0.05,
        split: str = "train",
        prompt: PromptName | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if prompt not in (None, "chat", "alpaca"):
            raise DataError(f"prompt must be 'chat' or 'alpaca', got {prompt!r}.")
        self.path = path
        self.validation_path = validation_path
        self.validation_share = validation_share
        self.split = split
        self._prompt = prompt
        self._warned: set[str] = set()
        self._hold_out = HoldOut(validation_share)

    @property
    def prompt(self) -> str:  # type: ignore[override]
        """Name of the prompt: the chosen one, else that of the model's adapter, else `"chat"`."""
        known = get_args(PromptName)
        return settle_prompt(self._prompt, self.trained_prompt, known, "chat", warned=self._warned)

    def encode(self, split: str) -> Encoded | None:
        """Encode `"train"`, `"validation"` or `"test"` (the validation data); see the base class."""
        if self.prompt == "chat":
            require_template(self.tokenizer)  # before anything is read
        rows = self._rows(split)
        if rows is None:
            return None
        encoder = SegmentEncoder(
            self.tokenizer,
            partial(chat, tokenizer=self.tokenizer) if self.prompt == "chat" else alpaca,
            self.max_length,
            bos=self.prompt != "chat" and adds_bos(self.tokenizer),
        )
        label = f"{self.name} {split}"
        return encode_rows(
            rows, encoder, key=self.prompt, label=label, num_proc=self.num_proc, digest=self.digest
        )

    def _rows(self, split: str) -> "Dataset | None":
        """The checked rows of a split."""
        train = split == "train"
        validation_path = self.validation_path
        if self.path == "sample" and validation_path is None:
            validation_path = "sample"
        if validation_path is not None:
            return self._read(self.path, "train") if train else self._read(validation_path, "heldout")
        rows = self._read(self.path, "train")
        if self.validation_share == 0:
            return rows if train else None
        return self._hold_out(rows)[0 if train else 1]

    def _read(self, source: str | Path | list[str | Path], part: str) -> "Dataset":
        from datasets import concatenate_datasets

        if source == "sample":
            kinds = ("instruction",) if self.prompt == "alpaca" else ("instruction", "chat")
            source = [sample_path(f"{kind}_{part}") for kind in kinds]
        sources = source if isinstance(source, list) else [source]
        if not sources:
            raise DataError("The list of files is empty. Give at least one.")
        features = instruction_features()
        return concatenate_datasets(
            [read_rows(one, check_instruction, features, split=self.split) for one in sources]
        )
