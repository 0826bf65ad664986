"""Long texts to windows of a model's length, in which every token is predicted once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from moka_pl.data.encoding.examples import eos_id, token_features, token_row
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.prompts.ends import opening_id

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class WindowEncoder:
    """Cuts texts into windows; encodes several rows to as many windows as they need.

    A text's tokens stand after one token that opens it. Window k covers ``max_length`` of these tokens, from
    token k * step on, where the step is ``stride``, or ``max_length - 1`` if that is less: two windows have
    at least one token in common, so that the first new one has something before it. New tokens are labelled.

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

    def features(self) -> "Features":
        """Columns of the windows: those of plain rows, and the words and bytes that begin in a window."""
        from datasets import Features, Value

        return Features({**token_features(), "words": Value("int64"), "bytes": Value("int64")})

    def __call__(self, rows: Mapping[str, Sequence[str]]) -> dict[str, list[Any]]:
        """Encodes texts; one without a token becomes an empty window with the status DROPPED."""
        ignored = rows.get("ignored") or [""] * len(rows["text"])
        windows = []
        for text, others in zip(rows["text"], ignored, strict=True):
            first, *rest = self._windows(text)
            windows += [first | {"ignored": others}, *(window | {"ignored": ""} for window in rest)]
        return {name: [window[name] for window in windows] for name in (*self.features(), "ignored")}

    def _windows(self, text: str) -> list[dict[str, Any]]:
        opening = opening_id(self.tokenizer)
        opening = eos_id(self.tokenizer) if opening is None else opening  # raises that there is none
        ids = [opening, *self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]]
        if len(ids) == 1:
            return [token_row([], [], 0) | {"words": 0, "bytes": 0}]
        if self.end:
            ids.append(eos_id(self.tokenizer))
        step = min(self.stride, self.max_length - 1)
        windows, done = [], 1
        for start in range(0, len(ids), step):
            end = min(start + self.max_length, len(ids))
            window = ids[start:end]
            known = len(window) - (end - done)
            # Counted with the first window: only the sums over all windows are ever looked at.
            words, size = (len(text.split()), len(text.encode())) if start == 0 else (0, 0)
            row = token_row(window, [IGNORE_INDEX] * known + window[known:], len(window))
            windows.append(row | {"words": words, "bytes": size})
            done = end
            if end == len(ids):
                break
        return windows
