"""What an evaluation found, by task and together, with standard errors."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from operator import add

SCORES = {"accuracy": "correct", "acc_norm": "correct_norm", "generated": "generated"}
"""Accuracy metrics, and the count that each is computed from."""


@dataclass(frozen=True)
class Share:
    """A share of right items.

    Attributes:
        value: Between 0 and 1.
        stderr: Its standard error; None for fewer than two items.
    """

    value: float
    stderr: float | None


@dataclass
class Counts:
    """Sums over the multiple-choice items of a task.

    Attributes:
        items: Items.
        correct: Items whose right option has the highest log-likelihood.
        correct_norm: The same per character of the option; NaN where options have no length.
        asked: Items that were answered by generating.
        generated: Those of them whose answer named the right option.
        nll: Summed negative log-likelihood of the right options' tokens, nats.
        tokens: Number of these tokens.
    """

    items: float = 0
    correct: float = 0
    correct_norm: float = 0
    asked: float = 0
    generated: float = 0
    nll: float = 0
    tokens: float = 0

    def __add__(self, other: "Counts") -> "Counts":
        """The counts of both together."""
        return Counts(*map(add, astuple(self), astuple(other)))

    def shares(self) -> dict[str, Share]:
        """Every score by its name; ``generated`` only where answers were generated.

        The standard error is that of a mean of ones and zeros, sqrt(p (1 - p) / (n - 1)).
        """
        shares = {}
        for name, count in SCORES.items():
            total = self.asked if name == "generated" else self.items
            if total and not math.isnan(getattr(self, count)):
                p = getattr(self, count) / total
                # Rounding may leave a hair less than 0.
                error = math.sqrt(max(0.0, p * (1 - p)) / (total - 1)) if total > 1 else None
                shares[name] = Share(p, error)
        return shares


def macro(tasks: Iterable[Mapping[str, Share]]) -> dict[str, Share]:
    """The plain means over tasks, and their standard errors, the tasks being independent of each other."""
    tasks = list(tasks)
    means = {}
    for name in SCORES:
        shares = [task[name] for task in tasks if name in task]
        if shares:
            errors = [share.stderr for share in shares if share.stderr is not None]
            known = len(errors) == len(shares)
            error = math.sqrt(sum(e * e for e in errors)) / len(shares) if known else None
            means[name] = Share(sum(share.value for share in shares) / len(shares), error)
    return means


def over_seeds(shares: Sequence[Share]) -> Share:
    """The mean of the same share over several seeds, with the scatter of items and of seeds in its error.

    The items are the same for all seeds, so their error does not shrink with the number of seeds.
    """
    values = [share.value for share in shares]
    seeds = statistics.variance(values) / len(values) if len(values) > 1 else 0.0
    items = statistics.fmean(share.stderr or 0.0 for share in shares)
    return Share(statistics.fmean(values), math.sqrt(items**2 + seeds))


@dataclass
class SetCounts:
    """Sums over one evaluation set.

    Attributes:
        name: Name of the set.
        tasks: Counts of its tasks by name; empty for plain text.
        nll: Summed negative log-likelihood, nats; for multiple choice of the right options' tokens.
        tokens: Number of these tokens.
        words: Words of plain text.
        bytes: UTF-8 bytes of plain text.
    """

    name: str
    tasks: dict[str, Counts] = field(default_factory=dict)
    nll: float = 0
    tokens: float = 0
    words: float = 0
    bytes: float = 0

    def perplexities(self) -> dict[str, float]:
        """Perplexity by token, word and byte; empty where the set holds no plain text."""
        if not (self.bytes and self.tokens):
            return {}
        counts = {"perplexity": self.tokens, "word_perplexity": self.words, "byte_perplexity": self.bytes}
        return {name: _exp(self.nll / count) for name, count in counts.items() if count}


@dataclass
class Results:
    """Everything that one evaluation found, the same on all ranks.

    Args:
        sets: The counts of every set, in their order.
        groups: Tasks that are reported together, by the name of the group.
    """

    sets: list[SetCounts]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def tasks(self) -> dict[str, Counts]:
        """Counts of every task with items; one task in two sets is the same task."""
        tasks: dict[str, Counts] = {}
        for one in self.sets:
            for task, counts in one.tasks.items():
                if counts.items:
                    tasks[task] = tasks.get(task, Counts()) + counts
        return tasks

    def members(self) -> dict[str, list[Counts]]:
        """The counts of every group's tasks, of groups with items only."""
        tasks = self.tasks
        groups = {name: [tasks[t] for t in names if t in tasks] for name, names in self.groups.items()}
        return {name: counts for name, counts in groups.items() if counts}

    def values(self) -> dict[str, float]:
        """The metrics by name.

        Returns:
            ``loss``, and ``accuracy`` and ``acc_norm`` over all tasks; with several sets ``<set>/loss`` and
            so on; ``accuracy/<task>``, ``acc_norm/<task>``, ``generated/<task>`` and ``nll/<task>``; of
            groups ``accuracy/<group>`` over all items and ``accuracy/<group>_macro`` over its tasks. Every
            share has its ``..._stderr``. Of plain text ``perplexity``, ``word_perplexity`` and
            ``byte_perplexity``. What has no items is left out.
        """
        values: dict[str, float] = {}
        losses = []
        several = len(self.sets) > 1
        for one in self.sets:
            before = f"{one.name}/" if several else ""
            if one.tokens:
                losses.append(one.nll / one.tokens)
                values |= {f"{before}loss": losses[-1]} if several else {}
            values |= {f"{before}{name}": value for name, value in one.perplexities().items()}
            if several:
                values |= flat(macro(c.shares() for c in one.tasks.values() if c.items), before=before)
        tasks = self.tasks
        for task, counts in tasks.items():
            values |= flat(counts.shares(), after=f"/{task}")
            values |= {f"nll/{task}": counts.nll / counts.tokens} if counts.tokens else {}
        for group, members in self.members().items():
            values |= flat(sum(members, Counts()).shares(), after=f"/{group}")
            values |= flat(macro(counts.shares() for counts in members), after=f"/{group}_macro")
        if losses:
            values["loss"] = sum(losses) / len(losses)
        return values | flat(macro(counts.shares() for counts in tasks.values()))


def flat(shares: Mapping[str, Share], *, before: str = "", after: str = "") -> dict[str, float]:
    """Returns values and standard errors by name.

    Args:
        shares: The scores by name.
        before: What is put before each name.
        after: What is put after it.
    """
    values = {}
    for name, share in shares.items():
        values[f"{before}{name}{after}"] = share.value
        if share.stderr is not None:
            values[f"{before}{name}{after}_stderr"] = share.stderr
    return values


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
