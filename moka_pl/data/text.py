"""Plain text: perplexity by sliding windows, and continued pre-training."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.data.base import SplitDataModule, check_at_least
from moka_pl.data.encoding.examples import Encoded
from moka_pl.data.encoding.windows import WindowEncoder
from moka_pl.data.formats.text import parse_text, read_text_file, text_features
from moka_pl.data.reading import read_rows
from moka_pl.data.sources import Shard

if TYPE_CHECKING:
    from datasets import Dataset


class TextData(SplitDataModule):
    """Texts without questions: trained on every token, evaluated by perplexity.

    Each text is cut into windows of max_length tokens that begin with the tokenizer's beginning-of-sequence
    token (or its end-of-sequence token where it has none), so that every token of the text counts exactly
    once. In validation and test a window begins ``stride`` tokens after the one before it, and only the
    tokens that the earlier windows have not counted are predicted: with a smaller stride each has more text
    before it, for more computation. Training windows do not overlap, and an end-of-sequence token ends each
    text. Reported are the perplexity per token (which depends on the tokenizer), per word (between white
    space) and per UTF-8 byte. Test data are the validation data.

    Args:
        path: A local .txt file (one text), a .json, .jsonl, .csv or .parquet file with a text a record, or a
            hub data set id.
        validation_path: The same for validation and test; None holds a share of the texts out.
        column: Field of the records that holds the text.
        split: Which split of a hub data set ``path`` names.
        validation_split: Which split of a hub data set ``validation_path`` names.
        config: Which configuration of a hub data set, if it has several.
        stride: Tokens between the beginnings of validation windows; None is half of max_length, max_length or
            more lets them not overlap.
        **options: validation_share and separate_test (see SplitDataModule); batch_size, max_length,
            num_workers, num_proc, seed, bucket, eval_batch_size (see MokaDataModule).
    """

    name = "text"
    prompt = "raw"

    def __init__(
        self,
        path: str | Path,
        validation_path: str | Path | None = None,
        column: str = "text",
        split: str = "train",
        validation_split: str = "validation",
        config: str | None = None,
        stride: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        check_at_least(1, stride=stride)
        self.path = path
        self.validation_path = validation_path
        self.column = column
        self.split = split
        self.validation_split = validation_split
        self.config = config
        self.stride = stride or max(1, self.max_length // 2)

    def encode(self, split: str) -> Encoded | None:
        """Encodes ``"train"``, ``"validation"`` or ``"test"`` (the validation data); see the base class."""
        train = split == "train"
        stride = self.max_length if train else self.stride
        encoder = WindowEncoder(self.tokenizer, self.max_length, stride, end=train)
        return self._encode(split, self._split_rows(split), encoder, f"windows {stride} {train}")

    def compared_rows(self) -> tuple["Dataset | None", list["Dataset"]]:
        """Nothing: texts are not looked through for those that were trained on."""
        return None, []

    def _shards(self, split: str) -> list[Shard]:
        options = {"name": self.config} if self.config else {}
        if split == "train":
            return [Shard(self.path, self.split, options, self.column)]
        if self.validation_path is None:
            return []
        return [Shard(self.validation_path, self.validation_split, options, self.column)]

    def _read(self, shard: Shard) -> "Dataset":
        path = Path(shard.source).expanduser()
        if path.suffix.lower() == ".txt":
            return read_text_file(path)
        return read_rows(shard, parse_text, text_features())
