"""The tokens of each piece of a text: where a prompt ends and its answer begins, token by token."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What a text may stand behind, so that a tokenizer which opens texts with a space puts none before it.
_ANCHORS = ("", "\n", "x", "0", ".")


def tokenize_pieces(tokenizer: "PreTrainedTokenizerBase", pieces: Sequence[str]) -> list[list[int]]:
    """Returns the tokens of the pieces of a text, which is tokenised as a whole.

    Where a token would reach over the border of two pieces, the text is tokenised up to the border and anew
    from there: these are the tokens of a model that is given the first piece and writes the second one.

    Borders are taken from the tokens' offsets only where these leave no doubt. Many tokenizers trim white
    space off them; the tokens of the text before the border then tell where it is.

    Args:
        tokenizer: A fast tokenizer.
        pieces: The text in pieces, some of which may be empty.
    """
    return _tokenize(tokenizer, list(pieces), "")


def _tokenize(tokenizer: "PreTrainedTokenizerBase", pieces: list[str], anchor: str) -> list[list[int]]:
    """The same for a text that stands behind ``anchor``, whose own tokens are left out."""
    found: list[list[int]] = []
    while True:
        text = _Text(tokenizer, anchor + "".join(pieces))
        borders: list[int] = []
        for cut in accumulate(map(len, pieces[:-1]), initial=len(anchor)):
            border = text.border(cut)
            if border is None:
                break
            borders.append(border)
        if not borders:  # the anchor has grown together with what follows
            others = (a for a in _ANCHORS[1:] if _Text(tokenizer, a + "".join(pieces)).border(len(a)))
            anchor = next(others, "")
            continue
        if len(borders) == len(pieces):
            return found + [text.ids[start:end] for start, end in pairwise([*borders, len(text.ids)])]
        left, pieces = pieces[: len(borders)], pieces[len(borders) :]
        found += (before := _tokenize(tokenizer, left, anchor))
        anchor = _anchor(
            tokenizer, list(chain.from_iterable(before)), "".join(pieces), text.ids[borders[0] :]
        )


def _anchor(tokenizer: "PreTrainedTokenizerBase", before: list[int], rest: str, whole: list[int]) -> str:
    """What the rest has to stand behind, so that its tokens and those before it say what the whole says."""
    expected = _decode(tokenizer, whole)
    for anchor in _ANCHORS:
        text = _Text(tokenizer, anchor + rest)
        start = text.border(len(anchor))
        if start is not None and _decode(tokenizer, before + text.ids[start:]) == expected:
            return anchor
    return ""


def _decode(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class _Text:
    """A tokenised text that knows how many tokens stand before a position."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", text: str) -> None:
        self.tokenizer, self.text = tokenizer, text
        encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        self.ids: list[int] = list(encoding["input_ids"])
        offsets = encoding["offset_mapping"]
        self.starts, self.ends = ([offset[side] for offset in offsets] for side in (0, 1))
        # Sorting what is sorted is the fastest way to see that it is.
        self.ordered = self.starts == sorted(self.starts) and self.ends == sorted(self.ends)

    def border(self, cut: int) -> int | None:
        """Returns the number of tokens before character ``cut``; None if a token reaches over it."""
        if cut in (0, len(self.text)):
            return len(self.ids) if cut else 0
        index = bisect_right(self.ends, cut)
        # One character's end and the next one's beginning, both seen: no white space can hide between them.
        if self.ordered and 0 < index < len(self.ids):
            before, after = index - 1, index
            if self.starts[before] < self.ends[before] == cut == self.starts[after] < self.ends[after]:
                return index
        known = self.tokenizer(self.text[:cut], add_special_tokens=False, verbose=False)["input_ids"]
        return len(known) if self.ids[: len(known)] == list(known) else None
