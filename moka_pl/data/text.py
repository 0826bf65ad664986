"""Plain text: perplexity by sliding windows, and continued pre-training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.data.base import MokaDataModule
from moka_pl.data.encoding.examples import Encoded, encode_rows
from moka_pl.data.encoding.windows import WindowEncoder
from moka_pl.data.formats.text import parse_text, read_text_file, text_features
from moka_pl.data.reading import read_rows
from moka_pl.data.splits import HoldOut
from moka_pl.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset


class TextData(MokaDataModule):
    """Texts without questions: trained on every token, evaluated by perplexity.

    Each text is cut into windows of max_length tokens that begin with the tokenizer's beginning-of-sequence
    token (or its end-of-sequence token where it has none), so that every token of the text counts exactly
    once. In validation and test a window begins `stride` tokens after the one before it, and only the tokens
    that the earlier windows have not counted are predicted: with a smaller stride each has more text before
    it, for more computation. Training windows do not overlap, and an end-of-sequence token ends each text.
    Reported are the perplexity per token (which depends on the tokenizer), per word (between white space) and
    per UTF-8 byte. Test data are the validation data.

    Args:
        path: A local .txt file (one text), a .json, .jsonl, .csv or .parquet file with a text a record, or a
            hub data set id.
        validation_path: The same for validation and test; None holds a share of the texts out.
        validation_share: Share of the texts to hold out where there is no validation_path; 0 trains without
            validation.
        column: Field of the records that holds the text.
        split: Which split of a hub data set `path` names.
        validation_split: Which split of a hub data set `validation_path` names.
        config: Which configuration of a hub data set, if it has several.
        stride: Tokens between the beginnings of validation windows; None is half of max_length, max_length or
            more lets them not overlap.
        **options: batch_size, max_length, num_workers, num_proc, seed, bucket, eval_batch_size (see
            MokaDataModule).
    """

    name = "text"
    prompt = "raw"

    def __init__(
        self,
        path: str | Path,
        validation_path: str | Path | None = None,
        validation_share: float = 0.05,
        column: str = "text",
        split: str = "train",
        validation_split: str = "validation",
        config: str | None = None,
        stride: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if stride is not None and stride < 1:
            raise DataError(f"stride must be at least 1, got {stride}.")
        self.path = path
        self.validation_path = validation_path
        self.validation_share = validation_share
        self.column = column
        self.split = split
        self.validation_split = validation_split
        self.config = config
        self.stride = stride or max(1, self.max_length // 2)
        self._hold_out = HoldOut(validation_share)

    def encode(self, split: str) -> Encoded | None:
        """Encode `"train"`, `"validation"` or `"test"` (the validation data); see the base class."""
        train = split == "train"
        rows = self._rows(train)
        if rows is None:
            return None
        stride = self.max_length if train else self.stride
        encoder = WindowEncoder(self.tokenizer, self.max_length, stride, end=train)
        label = f"{self.name} {split}"
        key = f"windows {stride} {train}"
        return encode_rows(rows, encoder, key=key, label=label, num_proc=self.num_proc, digest=self.digest)

    def _rows(self, train: bool) -> "Dataset | None":
        if self.validation_path is not None:
            return self._read(self.path, self.split) if train else self._read_validation()
        rows = self._read(self.path, self.split)
        if self.validation_share == 0:
            return rows if train else None
        return self._hold_out(rows)[0 if train else 1]

    def _read_validation(self) -> "Dataset":
        assert self.validation_path is not None
        return self._read(self.validation_path, self.validation_split)

    def _read(self, source: str | Path, split: str) -> "Dataset":
        if Path(source).suffix.lower() == ".txt":
            return read_text_file(Path(source).expanduser())
        features = text_features()
        options = {"name": self.config} if self.config else None
        return read_rows(source, parse_text, features, context=self.column, split=split, options=options)
