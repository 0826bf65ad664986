"""Plain text: perplexity by sliding windows, and continued pre-training."""

from typing import TYPE_CHECKING, Any

from moka_pl.data.base import SplitDataModule, check_at_least
from moka_pl.data.encoding.examples import Encoded
from moka_pl.data.encoding.windows import WindowEncoder
from moka_pl.data.formats.text import parse_text, read_text_file, text_features
from moka_pl.data.reading import read_rows
from moka_pl.data.sources import Shard, Sources, as_list
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from datasets import Dataset


class TextData(SplitDataModule):
    """Plain texts, trained on every token and evaluated by perplexity.

    Each text is cut into windows of max_length tokens that begin with the tokenizer's beginning-of-sequence
    token (or else its end-of-sequence token). Evaluation windows start ``stride`` tokens apart and score only
    tokens that no earlier window has scored, so each token counts exactly once; a smaller stride gives tokens
    more context but costs more computation. Training windows do not overlap, and each text ends with an
    end-of-sequence token. Metrics are the perplexity per token (which depends on the tokenizer), per word
    (split at white space) and per UTF-8 byte. The validation data also serve as test data.

    Args:
        path: A .txt file (one text), a .json, .jsonl, .csv or .parquet file with one text per record, or a
            hub dataset id; or a list of these.
        validation_path: The same for validation and test; None holds out a share of the texts.
        column: Column of the records that holds the text.
        split: Split of the hub dataset ``path``.
        validation_split: Split of the hub dataset ``validation_path``.
        config: Configuration of a hub dataset, if it has several.
        stride: Tokens between the starts of evaluation windows; None is half of max_length. With max_length
            or more, windows do not overlap.
        **options: validation_share and separate_test (see SplitDataModule); batch_size, max_length,
            num_workers, num_proc, seed, bucket, eval_batch_size (see MokaDataModule).
    """

    name = "text"
    prompt = "raw"

    def __init__(
        self,
        path: Sources,
        validation_path: Sources | None = None,
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
        """Nothing: texts are not searched for training data."""
        return None, []

    def _shards(self, split: str) -> list[Shard]:
        options = {"name": self.config} if self.config else {}
        if split == "train":
            return [Shard(source, self.split, options, self.column) for source in as_list(self.path)]
        if self.validation_path is None:
            return []
        sources = as_list(self.validation_path)
        return [Shard(source, self.validation_split, options, self.column) for source in sources]

    def _read(self, shard: Shard) -> "Dataset":
        path = expanded(shard.source)
        if path.suffix.lower() == ".txt":
            return read_text_file(path)
        return read_rows(shard, parse_text, text_features(), skip_blank=False)
