"""Evaluates a batch in parts where the memory does not hold all of it."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from lightning.pytorch.utilities.memory import garbage_collection_cuda, is_oom_error

from moka_pl.errors import ConfigError, MokaWarning, one_line

T = TypeVar("T")


class OutOfMemoryError(ConfigError):
    """Not even one row fits into the memory."""


class Halving:
    """Computes as many rows at a time as fit: half as many after each failure, for all batches that follow.

    Args:
        what: What the rows are, in the plural.
        remedy: What helps where not even one of them fits.
    """

    def __init__(self, what: str, remedy: str) -> None:
        self.what = what
        self.remedy = remedy
        self.most: int | None = None

    def parts(self, rows: int, compute: Callable[[slice], T]) -> list[T]:
        """Returns what ``compute`` makes of all rows, a slice of them at a time.

        Args:
            rows: Their number.
            compute: Takes the slice of some rows.

        Raises:
            OutOfMemoryError: If one row alone does not fit.
        """
        done: list[T] = []
        start, before = 0, self.most
        while start < rows:
            part = slice(start, min(start + (self.most or rows), rows))
            try:
                done.append(compute(part))
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                reason = one_line(error)
            else:
                start = part.stop
                continue
            # Not before the handler has ended: the error holds what was computed.
            garbage_collection_cuda()
            size = part.stop - part.start
            if size == 1:
                raise self.failure(reason)
            self.most = size // 2
        if self.most != before and (said := self.said(before or rows)):
            _say(said)
        return done

    def failure(self, reason: str) -> Exception:
        """Makes the error of one row that does not fit."""
        return OutOfMemoryError(f"one of the {self.what} alone does not fit: {reason}. {self.remedy}")

    def said(self, before: int) -> str:
        """Returns how it goes on, where ``before`` rows at a time were too many; nothing if that is known."""
        return f"with {before} {self.what} at a time; the evaluation goes on with {self.most}"


def halved_until_it_fits(size: int, compute: Callable[[int], T]) -> T:
    """Returns what ``compute`` makes of a batch size, or of half as many until the memory suffices.

    Raises:
        OutOfMemoryError: If a size of 1 is too large.
    """
    while True:
        try:
            return compute(size)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            reason = one_line(error)
        garbage_collection_cuda()
        if size == 1:
            raise OutOfMemoryError(f"a batch size of 1 does not fit: {reason}. Free memory of the device")
        size //= 2
        _say(f"with a batch size of {2 * size}; the evaluation begins again with {size}")


def _say(what: str) -> None:
    warnings.warn(
        f"out of memory {what}", MokaWarning, stacklevel=3
    )  # on every rank: each has its own memory


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device, or the computer, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or is_oom_error(error):
        return True
    words = ("out of memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
    return isinstance(error, RuntimeError) and any(word in str(error) for word in words)
