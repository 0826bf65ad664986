"""Scores of single test items, and the methods' differences on them: a paired bootstrap and a sign test."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from moka_pl.errors import ConfigError
from moka_pl.evaluation.results import Share, over_seeds

#: Samples of the bootstrap, and how many of them are counted at once.
SAMPLES = 10_000
_CHUNK = 500

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
        _, task_index, counts = numpy.unique(self.task, return_inverse=True, return_counts=True)
        weights: Floats = 1.0 / (len(counts) * counts[task_index])
        return weights

    def nll_per_token(self) -> Share:
        """The mean over seeds, with its standard error (of a ratio of sums over items; and of seeds)."""
        return per_token(self.nll, self.tokens)


def per_token(sums: Floats, tokens: Floats) -> Share:
    """The mean over seeds of a ratio of sums over items, with the standard error of items and seeds.

    Args:
        sums: What is summed, by seed and item, shape (S, n).
        tokens: Tokens of every item, shape (n,).
    """
    total, n = tokens.sum(), len(tokens)
    shares = []
    for row in sums:
        ratio = row.sum() / total
        spread = ((row - ratio * tokens) ** 2).sum()
        error = math.sqrt(spread * n / (n - 1)) / total if n > 1 else None
        shares.append(Share(float(ratio), error))
    return over_seeds(shares)


@dataclass(frozen=True)
class Forgotten:
    """Negative log-likelihood per token of a plain text, nats; differences are paired by window.

    Attributes:
        before: Of the base.
        after: After the trainings.
        difference: After minus before.
        over_reference: After minus after the reference's trainings with the same seeds; None without any.
    """

    before: Share
    after: Share
    difference: Share
    over_reference: Share | None


ByColumn = Mapping[str, list[Any]]


def forgotten(
    by_seed: Mapping[int, ByColumn], reference: Mapping[int, ByColumn] | None = None
) -> Forgotten | None:
    """What trainings did to the likelihood of a plain text.

    Args:
        by_seed: What :func:`~moka_pl.studies.compare.runs.text_columns` returned, by seed.
        reference: The same of the method that the others are compared with.

    Returns:
        The scores; None where no text was scored.
    """
    known = {seed: table for seed, table in sorted(by_seed.items()) if "text_after" in table}
    if not known:
        return None
    tables = list(known.values())
    tokens = numpy.asarray(tables[0]["text_tokens"], float)  # (n,)
    before, after = (_stack(tables, column) for column in ("text_before", "text_after"))  # (S, n)
    seeds = [seed for seed in known if "text_after" in (reference or {}).get(seed, {})]
    over = None
    if reference and seeds and reference[seeds[0]]["text_tokens"] == tables[0]["text_tokens"]:
        own, others = ([one[seed] for seed in seeds] for one in (known, reference))
        over = per_token(_stack(own, "text_after") - _stack(others, "text_after"), tokens)
    return Forgotten(
        per_token(before[:1], tokens), per_token(after, tokens), per_token(after - before, tokens), over
    )


def _stack(tables: Sequence[ByColumn], column: str) -> Floats:
    return numpy.asarray([table[column] for table in tables], float)


def stack_items(by_seed: Mapping[int, Mapping[str, list[Any]]]) -> Items:
    """Puts the items of several seeds together.

    Args:
        by_seed: What :func:`~moka_pl.studies.compare.shared_base.columns` returned, by seed.

    Raises:
        ConfigError: If they are not the same items.
    """
    tables = list(by_seed.values())
    first = tables[0]
    for table in tables[1:]:
        if table["task"] != first["task"] or table["tokens"] != first["tokens"]:
            raise ConfigError(
                "the seeds of a method were tested on different items: the test data have changed; delete "
                "the folder and run the suite again"
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
    """Whether two methods were tested on the same items, as far as tasks and tokens tell."""
    return bool(numpy.array_equal(one.task, other.task) and numpy.array_equal(one.tokens, other.tokens))


@dataclass(frozen=True)
class Difference:
    """One minus the other.

    Attributes:
        value: The difference of the means.
        low: Lower end of its 95% interval.
        high: Upper end.
        p: Two-sided p-value of no difference.
    """

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Comparison:
    """Two methods on the same items.

    Attributes:
        one: The one's name.
        other: The other's.
        seeds: The seeds that both were trained with.
        acc_norm: Difference of the mean over tasks, of shares; None for plain text.
        nll: Difference of the negative log-likelihood per token.
        wins: Items that the one has right more often, over the seeds.
        losses: Items that the other has.
        sign_p: Two-sided p-value of the sign test on them; None for plain text.
    """

    one: str
    other: str
    seeds: tuple[int, ...]
    acc_norm: Difference | None
    nll: Difference
    wins: int
    losses: int
    sign_p: float | None


@dataclass(frozen=True)
class Resampled:
    """Scores on the same random samples of the items.

    Attributes:
        items: The items.
        acc_norm: Mean over tasks by sample and seed, shape (samples, S); None for plain text.
        nll: Negative log-likelihood per token, shape (samples, S).
    """

    items: Items
    acc_norm: Floats | None
    nll: Floats


def resample(methods: Mapping[str, Items], samples: int = SAMPLES) -> dict[str, Resampled]:
    """Scores all methods on samples of their common items, drawn with replacement within every task.

    Args:
        methods: Items by name of the method.
        samples: Number of samples.

    Raises:
        ConfigError: If two methods were tested on different items.
    """
    if not methods:
        return {}
    first = next(iter(methods.values()))
    for name, items in methods.items():
        if not same_items(first, items):
            raise ConfigError(f"{name} was tested on other items than {next(iter(methods))}: nothing to pair")
    random = numpy.random.default_rng(0)
    columns = numpy.concatenate([_columns(items) for items in methods.values()], axis=1)  # (n, all columns)
    by_task = [numpy.flatnonzero(first.task == task) for task in first.tasks]
    sums = numpy.empty((samples, columns.shape[1]))
    for start in range(0, samples, _CHUNK):
        size = min(_CHUNK, samples - start)
        counts = numpy.zeros((size, len(first.task)))
        for task_items in by_task:
            n = len(task_items)
            draws = random.integers(n, size=(size, n)) + n * numpy.arange(size)[:, None]
            drawn = numpy.bincount(draws.ravel(), minlength=size * n)
            counts[:, task_items] = drawn.reshape(size, n)
        sums[start : start + size] = counts @ columns
    resampled, column = {}, 0
    for name, items in methods.items():
        width = len(items.seeds)
        totals = sums[:, column : column + 2 * width + 1]
        column += 2 * width + 1
        accuracy = None if items.correct is None else totals[:, :width]
        resampled[name] = Resampled(items, accuracy, totals[:, width : 2 * width] / totals[:, -1:])
    return resampled


def compare(methods: Mapping[str, Resampled], one: str, other: str, seed: int = 0) -> Comparison | None:
    """Compares two methods, averaged over the seeds that both have.

    The 95% intervals and p-values are of items and seeds together: every sample of items is joined with a
    sample of the seeds. A few seeds tell little of how much seeds differ, so that intervals are rather too
    narrow where that matters.

    Args:
        methods: What :func:`resample` returned.
        one: Name of a method.
        other: Name of another.
        seed: Seed of the draws.

    Returns:
        The comparison; None if they have no seed in common.
    """
    left, right = methods[one], methods[other]
    seeds = tuple(s for s in left.items.seeds if s in right.items.seeds)
    if not seeds:
        return None
    left_rows = [left.items.seeds.index(s) for s in seeds]
    right_rows = [right.items.seeds.index(s) for s in seeds]
    draws = numpy.random.default_rng(seed).multinomial(
        len(seeds), [1 / len(seeds)] * len(seeds), size=len(left.nll)
    )
    weights = draws / len(seeds)  # (samples, S)

    def difference(samples: Floats, value: float) -> Difference:
        means = (samples * weights).sum(1)
        low, high = numpy.quantile(means, [0.025, 0.975])
        below, above = int((means <= 0).sum()), int((means >= 0).sum())
        p = min(1.0, 2 * (1 + min(below, above)) / (1 + len(means)))
        return Difference(value, float(low), float(high), p)

    tokens = left.items.tokens.sum()
    nll = float((left.items.nll[left_rows] - right.items.nll[right_rows]).sum(1).mean() / tokens)
    accuracy, wins, losses, sign_p = None, 0, 0, None
    if left.acc_norm is not None and right.acc_norm is not None:
        assert left.items.correct is not None
        assert right.items.correct is not None
        by_item = (left.items.correct[left_rows] - right.items.correct[right_rows]).mean(0)  # (n,)
        value = float(by_item @ left.items.task_weights)
        accuracy = difference(left.acc_norm[:, left_rows] - right.acc_norm[:, right_rows], value)
        wins, losses = int((by_item > 0).sum()), int((by_item < 0).sum())
        sign_p = sign_test(wins, losses)
    return Comparison(
        one,
        other,
        seeds,
        accuracy,
        difference(left.nll[:, left_rows] - right.nll[:, right_rows], nll),
        wins,
        losses,
        sign_p,
    )


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p-value of wins and losses that were equally likely."""
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    tail, term = 0, 1  # term: n over k
    for k in range(fewer + 1):
        tail += term
        term = term * (n - k) // (k + 1)
    # Whole numbers of thousands of bits: their quotient as a float only at the end.
    return min(1.0, math.exp(math.log(2) + math.log(tail) - n * math.log(2)))


def _columns(items: Items) -> Floats:
    """What is summed over items: accuracies and log-likelihoods by seed, and tokens; (n, 2S + 1)."""
    none = numpy.zeros_like(items.nll)
    correct = none if items.correct is None else items.correct
    return numpy.concatenate([(correct * items.task_weights).T, items.nll.T, items.tokens[:, None]], axis=1)
