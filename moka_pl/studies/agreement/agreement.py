"""Whether two evaluations of the same multiple-choice questions agree, item for item."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from moka_pl.errors import ConfigError

TOLERANCE = 1e-3
"""Log-likelihoods (nats, summed over an option's tokens) may differ by this much: float32, other batches."""

TIE = 1e-5
"""Scores whose difference is below this share of them count as tied."""

_HEAD = (
    "task",
    "items",
    "acc package / harness",
    "acc_norm package / harness",
    "acc / acc_norm of `test`",
    "ties",
    "items that differ",
    "largest difference of a log-likelihood",
)


@dataclass(frozen=True)
class Item:
    """One question as one side scored it.

    Attributes:
        tokens: Token ids of prompt and option together, for every option.
        borders: Number of the prompt's tokens, for every option.
        log_likelihoods: Of every option, nats.
        chars: Characters of every option, without the space before it.
        answer: Index of the right option.
        acc: Whether this side counts the question as answered rightly; None works it out from the scores.
        acc_norm: The same per character; None works it out from the scores.
    """

    tokens: list[list[int]]
    borders: list[int]
    log_likelihoods: list[float]
    chars: list[int]
    answer: int
    acc: bool | None = None
    acc_norm: bool | None = None

    @property
    def normalised(self) -> list[float]:
        """Log-likelihoods per character."""
        return [score / chars for score, chars in zip(self.log_likelihoods, self.chars, strict=True)]

    def right(self) -> bool:
        """Whether the right option has the highest log-likelihood; of tied options the first one counts."""
        return _first_best(self.log_likelihoods) == self.answer if self.acc is None else self.acc

    def right_norm(self) -> bool:
        """Whether the right option has the highest log-likelihood per character."""
        return _first_best(self.normalised) == self.answer if self.acc_norm is None else self.acc_norm


@dataclass(frozen=True)
class Difference:
    """A question on which the two sides differ.

    Attributes:
        index: Its number in the file, from 0.
        what: What differs: ``tokens``, ``answer``, ``acc``, ``acc_norm`` or ``log-likelihood``.
        package: The package's log-likelihoods of the options, nats.
        harness: The harness'.
    """

    index: int
    what: str
    package: list[float]
    harness: list[float]


@dataclass
class Agreement:
    """What the comparison of one task found.

    Attributes:
        task: Its name.
        items: Number of questions.
        acc: Share of right answers, the package's and the harness'.
        acc_norm: The same with log-likelihoods per character.
        ties: Questions with two options tied for the best score, by either score.
        largest: Largest difference of a log-likelihood, nats.
        differences: The questions on which the sides differ.
        reported: Metrics of the package's ``test`` on the same questions: ``accuracy`` and ``acc_norm``.
        notes: What else disagrees.
    """

    task: str
    items: int
    acc: tuple[float, float]
    acc_norm: tuple[float, float]
    ties: int
    largest: float
    differences: list[Difference]
    reported: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        """Whether nothing differs."""
        return not self.differences and not self.notes


def compare(
    task: str, package: Sequence[Item], harness: Sequence[Item], reported: dict[str, float] | None = None
) -> Agreement:
    """Compares the two sides' scores of the same questions in the same order.

    Args:
        task: The task's name.
        package: The package's scores.
        harness: The harness'.
        reported: Metrics of the package's ``test``, to be compared with the harness'.

    Raises:
        ConfigError: If the sides hold different numbers of questions, or none.
    """
    if len(package) != len(harness) or not package:
        raise ConfigError(
            f"{task}: nothing to compare between {len(package)} questions of the package and "
            f"{len(harness)} of the harness"
        )
    pairs = list(zip(package, harness, strict=True))
    count = len(pairs)
    agreement = Agreement(
        task=task,
        items=count,
        acc=(sum(a.right() for a, _ in pairs) / count, sum(b.right() for _, b in pairs) / count),
        acc_norm=(
            sum(a.right_norm() for a, _ in pairs) / count,
            sum(b.right_norm() for _, b in pairs) / count,
        ),
        ties=sum(_tied(a.log_likelihoods) or _tied(a.normalised) for a in package),
        largest=max(_distance(a, b) for a, b in pairs),
        differences=[
            Difference(index, what, a.log_likelihoods, b.log_likelihoods)
            for index, (a, b) in enumerate(pairs)
            if (what := _difference(a, b))
        ],
        reported=dict(reported or {}),
    )
    for name, value in (("accuracy", agreement.acc[1]), ("acc_norm", agreement.acc_norm[1])):
        tested = agreement.reported.get(name)
        if tested is not None and abs(tested - value) > 0.5 / count:
            agreement.notes.append(
                f"{name} is {tested:.4f} by the package's test, {value:.4f} by the harness"
            )
    return agreement


def agreement_table(agreements: Sequence[Agreement]) -> str:
    """A Markdown table, a row a task; below it every question on which the sides differ."""
    rows: list[tuple[str, ...]] = [_HEAD, ("---",) * len(_HEAD)]
    for task in agreements:
        reported = [task.reported.get(name) for name in ("accuracy", "acc_norm")]
        rows.append(
            (
                task.task,
                str(task.items),
                "{:.4f} / {:.4f}".format(*task.acc),
                "{:.4f} / {:.4f}".format(*task.acc_norm),
                " / ".join("-" if value is None else f"{value:.4f}" for value in reported),
                str(task.ties),
                str(len(task.differences)),
                f"{task.largest:.1e}",
            )
        )
    lines = [f"| {' | '.join(row)} |" for row in rows]
    for task in agreements:
        lines += [f"{task.task}: {note}" for note in task.notes]
        lines += [
            f"{task.task}, item {item.index}: {item.what}; package {_scores(item.package)}, harness "
            f"{_scores(item.harness)}"
            for item in task.differences
        ]
    return "\n".join(lines)


def _difference(package: Item, harness: Item) -> str:
    """What differs first, in the order of causes; empty if nothing does."""
    if (package.tokens, package.borders) != (harness.tokens, harness.borders):
        return "tokens"
    if (package.answer, package.chars) != (harness.answer, harness.chars):
        return "answer"
    # Both before the scores themselves: they are what an evaluation is about.
    if package.right() != harness.right():
        return "acc"
    if package.right_norm() != harness.right_norm():
        return "acc_norm"
    return "" if _distance(package, harness) <= TOLERANCE else "log-likelihood"


def _distance(package: Item, harness: Item) -> float:
    if len(package.log_likelihoods) != len(harness.log_likelihoods):
        return math.inf
    gaps = [abs(a - b) for a, b in zip(package.log_likelihoods, harness.log_likelihoods, strict=True)]
    # `max` may pass over a NaN.
    return math.inf if any(map(math.isnan, gaps)) else max(gaps)


def _first_best(scores: Sequence[float]) -> int:
    return max(range(len(scores)), key=scores.__getitem__)


def _tied(scores: Sequence[float]) -> bool:
    best, second = sorted(scores, reverse=True)[:2]
    return best - second <= TIE * abs(best)


def _scores(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4f}" for value in values) + "]"
