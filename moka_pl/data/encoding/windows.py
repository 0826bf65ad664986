"""Long texts to windows of a model's length, in which every token is predicted once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moka_pl.data.encoding.examples import DROPPED, KEPT, token_features
from moka_pl.errors import DataError
from moka_pl.lm.scoring import IGNORE_INDEX

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class WindowEncoder:
    """Cuts texts into windows; encodes several rows to as many windows as they need.

    A text's tokens stand after one token that opens it. Window k covers `max_length` of these tokens, from
    token k * step on, where the step is `stride`, or `max_length - 1` if that is less: two windows have at
    least one token in common, so that the first new one has something before it. Labelled are the tokens
    that are new.

    Attributes:
        tokenizer: A tokenizer with a beginning- or end-of-sequence token.
        max_length: Tokens of a window.
        stride: Tokens between the beginnings of windows.
        end: Whether the end-of-sequence token follows the text, labelled.
    """

    batched: ClassVar[bool] = True
    bos: ClassVar[bool] = True

    tokenizer: "PreTrainedTokenizerBase"
    max_length: int
    stride: int
    end: bool

    @property
    def features(self) -> "Features":
        """Columns of the windows: those of plain rows, and the words and bytes that begin in a window."""
        from datasets import Features, Value

        return Features({**token_features(), "words": Value("int64"), "bytes": Value("int64")})

    def __call__(self, rows: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Encode texts; one without a token becomes an empty window with the status DROPPED."""
        columns: dict[str, list[Any]] = {name: [] for name in self.features}
        for text in rows["text"]:
            for window in self._windows(text):
                for name, value in window.items():
                    columns[name].append(value)
        return columns

    def _windows(self, text: str) -> list[dict[str, Any]]:
        ids = [self._opening(), *self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        if self.end and len(ids) > 1:
            ids.append(self._eos())
        if len(ids) == 1:
            return [_window([], [], 0, 0) | {"status": DROPPED}]
        step = min(self.stride, self.max_length - 1)
        windows, done = [], 1
        for start in range(0, len(ids), step):
            end = min(start + self.max_length, len(ids))
            new = end - done
            own = ids[start:end]
            labels = [IGNORE_INDEX] * (len(own) - new) + own[len(own) - new :]
            # Counted with the first window: only the sums over all windows are ever looked at.
            counts = (len(text.split()), len(text.encode())) if start == 0 else (0, 0)
            windows.append(_window(own, labels, *counts))
            done = end
            if end == len(ids):
                break
        return windows

    def _opening(self) -> int:
        bos = self.tokenizer.bos_token_id
        return int(bos) if bos is not None else self._eos()

    def _eos(self) -> int:
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                f"The tokenizer {type(self.tokenizer).__name__} has no end-of-sequence token. Set "
                "`tokenizer.eos_token`."
            )
        return int(self.tokenizer.eos_token_id)


def _window(ids: list[int], labels: list[int], words: int, size: int) -> dict[str, Any]:
    count = len(ids)
    return {
        "input_ids": ids,
        "labels": labels,
        "length": count,
        "slots": count,
        "full_length": count,
        "tokens": count,
        "trained": sum(label != IGNORE_INDEX for label in labels),
        "status": KEPT,
        "words": words,
        "bytes": size,
    }
