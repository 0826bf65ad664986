"""What single test items scored, as arrays over seeds and items."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from moka_pl.errors import ConfigError
from moka_pl.evaluation.results import Share, over_seeds

Floats = NDArray[numpy.float64]


@dataclass(frozen=True)
class Items:
    """The same n items, scored after S trainings.

    Attributes:
        seeds: The S seeds.
        task: Name of every item's task, shape (n,).
        correct: 1 where the right option had the highest likelihood per character, shape (S, n); None for
            plain text.
        nll: Summed negative log-likelihood of the right option, nats, shape (S, n).
        tokens: Number of its tokens, shape (n,).
    """

    seeds: tuple[int, ...]
    task: NDArray[numpy.str_]
    correct: Floats | None
    nll: Floats
    tokens: Floats

    @property
    def tasks(self) -> list[str]:
        """The tasks in order of their names."""
        return [str(task) for task in numpy.unique(self.task)]

    @property
    def task_weights(self) -> Floats:
        """Weight of every item in the plain mean over tasks, shape (n,)."""
        _, place, counts = numpy.unique(self.task, return_inverse=True, return_counts=True)
        weights: Floats = 1.0 / (len(counts) * counts[place])
        return weights

    def nll_per_token(self) -> Share:
        """The mean over seeds, with its standard error (of a ratio of sums over items; and of seeds)."""
        total, n = self.tokens.sum(), len(self.tokens)
        shares = []
        for row in self.nll:
            ratio = row.sum() / total
            spread = ((row - ratio * self.tokens) ** 2).sum()
            error = math.sqrt(spread * n / (n - 1)) / total if n > 1 else None
            shares.append(Share(float(ratio), error))
        return over_seeds(shares)


def stack_items(by_seed: Mapping[int, Mapping[str, list[Any]]]) -> Items:
    """Puts the items of several seeds together.

    Args:
        by_seed: What `moka_pl.studies.compare.module.columns` returned, by seed.

    Raises:
        ConfigError: If they are not the same items.
    """
    tables = list(by_seed.values())
    first = tables[0]
    for table in tables[1:]:
        if table["task"] != first["task"] or table["tokens"] != first["tokens"]:
            raise ConfigError(
                "the seeds of a rival were tested on different items: the test data have changed. Delete the "
                "folder and run the suite again"
            )
    answered = bool(first["correct_norm"])
    return Items(
        tuple(by_seed),
        numpy.asarray(first["task"], dtype=str),
        numpy.asarray([table["correct_norm"] for table in tables], float) if answered else None,
        numpy.asarray([table["nll"] for table in tables], float),
        numpy.asarray(first["tokens"], float),
    )


def same_items(one: Items, other: Items) -> bool:
    """Whether two rivals were tested on the same items, as far as tasks and tokens tell."""
    return bool(numpy.array_equal(one.task, other.task) and numpy.array_equal(one.tokens, other.tokens))
