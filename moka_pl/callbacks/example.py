"""The example that is shown when training begins."""

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moka_pl.data.types import HasTokenizer
from moka_pl.errors import printable
from moka_pl.lm.scoring import IGNORE_INDEX

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BEGIN, END = ">>>", "<<<"
"""What stands around trained text, with and without colours."""

_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"
_MOST_LINES = 20
_MOST_PARTS = 7  # more turns than this lose those in the middle


class ExamplePrinter(Callback):
    """Prints the first training example as the model reads it, with marks around what is trained.

    It is taken from the first batch, so that nothing is read twice, and the order of the data stays. The
    first rank prints it, on one screen at most: long texts are cut in the middle. Special tokens are shown,
    padding is not. Batches of other data modules and plain loaders are shown if they have ``input_ids`` and
    ``labels``.

    Args:
        show: Whether to print it.
    """

    def __init__(self, show: bool = True) -> None:
        self.show = show
        self._due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints an example of the first batch that has one."""
        self._due = self.show and trainer.is_global_zero

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Prints it once."""
        if not self._due or not isinstance(pl_module, HasTokenizer):
            return
        example = first_example(batch)
        if example is None:
            return
        self._due = False
        text = example_text(*example, pl_module.tokenizer, colour=_has_colours(), size=_screen())
        encoding = sys.stdout.encoding or "utf-8"
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        bar = trainer.progress_bar_callback
        (print if bar is None else bar.print)(text)


def first_example(batch: Any) -> tuple[list[int], list[int]] | None:
    """Returns the tokens and labels of a batch's first example with a label; None if there is none."""
    ids, labels = (
        batch.get(name) if isinstance(batch, Mapping) else None for name in ("input_ids", "labels")
    )
    if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or ids.shape != labels.shape:
        return None
    ids, labels = ids.reshape(-1, ids.shape[-1]), labels.reshape(-1, labels.shape[-1])
    trained = (labels[:, 1:] != IGNORE_INDEX).any(dim=1).nonzero().flatten().tolist()
    if not trained:
        return None
    row, wanted = ids[trained[0]].tolist(), labels[trained[0]].tolist()
    if "position_ids" in batch:  # packed: the first example of the row that has a label
        positions = batch["position_ids"][trained[0]].tolist()
        starts = [index for index, position in enumerate(positions) if position == 0] + [len(row)]
        start, end = next(
            span for span in pairwise(starts) if any(one != IGNORE_INDEX for one in wanted[slice(*span)])
        )
        row, wanted = row[start:end], wanted[start:end]
    return row, wanted


def example_text(
    ids: Sequence[int],
    labels: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    colour: bool,
    size: tuple[int, int],
) -> str:
    """Returns an example as text with a heading, on one screen.

    Args:
        ids: Its tokens, possibly padded on the right.
        labels: ``IGNORE_INDEX`` for tokens that are not trained.
        tokenizer: Its tokenizer.
        colour: Whether to colour what is trained, too.
        size: Columns and lines of the screen.
    """
    count = len(ids)
    while count and labels[count - 1] == IGNORE_INDEX and ids[count - 1] in (tokenizer.pad_token_id, 0):
        count -= 1
    columns, lines = size
    flags = [label != IGNORE_INDEX for label in labels[:count]]
    parts = _parts(ids[:count], flags, tokenizer)
    if len(parts) > _MOST_PARTS:
        half = _MOST_PARTS // 2
        left_out = f"\n[... {len(parts) - 2 * half} parts left out ...]\n"
        parts = [*parts[:half], (left_out, False), *parts[-half:]]
    room = min(_MOST_LINES, lines - 4)
    cut = [(_cut(text, columns, max(2, room // len(parts))), trained) for text, trained in parts]
    whole = sum(_height(text, columns) for text, _ in parts) <= room
    begin, end = (_GREEN + BEGIN, END + _PLAIN) if colour else (BEGIN, END)
    shown = "".join(begin + text + end if trained else text for text, trained in (parts if whole else cut))
    trained = sum(flags[1:])  # nothing predicts the first token
    heading = f"first training example: {count:,} tokens, {trained:,} trained, between {BEGIN} and {END}"
    return f"{heading}\n{shown}"


def _parts(
    ids: Sequence[int], flags: Sequence[bool], tokenizer: "PreTrainedTokenizerBase"
) -> list[tuple[str, bool]]:
    """Decodes stretches of tokens that are trained or not alike."""
    parts: list[tuple[str, bool]] = []
    known, end = "", 0
    for trained, group in groupby(flags):
        end += len(list(group))
        # Decoded with all that stands before: alone, some tokenizers leave out a leading space.
        text = str(
            tokenizer.decode(list(ids[:end]), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )
        parts.append((printable(text[len(known) :], kept="\n\t"), trained))
        known = text
    return parts


def _height(text: str, columns: int) -> int:
    return len(_lines(text, columns))


def _lines(text: str, columns: int) -> list[str]:
    """Returns what a terminal makes of a text: lines as wide as the screen."""
    wrapped: list[str] = []
    for line in text.expandtabs().split("\n"):
        wrapped += [line[start : start + columns] for start in range(0, max(1, len(line)), columns)]
    return wrapped


def _cut(text: str, columns: int, room: int) -> str:
    """Leaves out the middle of a text that takes more than ``room`` lines."""
    lines = _lines(text, columns)
    if len(lines) <= room:
        return text
    head = room // 2
    tail = max(1, room - head - 1)
    left_out = f"[... {len(lines) - head - tail:,} lines left out ...]"
    return "\n".join([*lines[:head], left_out, *lines[-tail:]])


def _has_colours() -> bool:
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def _screen() -> tuple[int, int]:
    columns, lines = shutil.get_terminal_size()
    return max(20, columns), max(10, lines)
