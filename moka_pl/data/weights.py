"""How often the examples of each part of a mixture are used in an epoch."""

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray

from moka_pl.errors_part import DataError


def check_weights(weights: Sequence[float] | None, parts: int) -> None:
    """Refuse weights that no mixture can have.

    Raises:
        DataError: There are not as many as parts, or one is not above 0.
    """
    if weights is None:
        return
    if len(weights) != parts:
        raise DataError(f"weights has {len(weights)} values, but there are {parts} parts. Give one per part.")
    if not all(0 < weight < float("inf") for weight in weights):
        raise DataError(f"weights must be above 0, got {list(weights)}. Leave out a part that is not wanted.")


def epoch_counts(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Examples of each part in an epoch: in the ratio of the weights, and no part less than once.

    Args:
        sizes: Examples of each part.
        weights: Share of each part, in any unit.

    Returns:
        At least the size for every part, and exactly that for the part which its weight repeats least.
    """
    length = max(size / weight for size, weight in zip(sizes, weights, strict=True))
    return [max(size, round(weight * length)) for size, weight in zip(sizes, weights, strict=True)]


def repeated(size: int, count: int, seed: Sequence[int]) -> NDArray[numpy.int64]:
    """Indices of `count` examples out of `size`: every one equally often, up to one more for some.

    Args:
        size: Number of examples.
        count: Number of indices.
        seed: Which examples are taken once more depends on it alone.

    Returns:
        `count` indices.
    """
    times, rest = divmod(count, size)
    whole = numpy.tile(numpy.arange(size, dtype=numpy.int64), times)  # (times * size,)
    return numpy.concatenate([whole, numpy.random.default_rng(list(seed)).permutation(size)[:rest]])
