"""Which scaling of servable updates needs no new learning rate when their rank or number changes."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import SERVABLE
from moka_pl.studies.compare.report import Entry, Report
from moka_pl.studies.compare.suite import Settings

#: Rank k² of a component, and number of components.
Size = tuple[int, int]

#: Parts of the factor s of an update with c components of rank k²: by their number, and by their width k.
#: All products are 1 for one component of rank 16.
_BY_NUMBER: Mapping[str, Callable[[int], float]] = {"c": float, "√c": math.sqrt}
_BY_WIDTH: Mapping[str, Callable[[float], float]] = {
    "": lambda k: 1.0,
    " · 2 / √k": lambda k: 2 / math.sqrt(k),
    " · 4 / k": lambda k: 4 / k,
}


Rule = Callable[[float, int], float]


def rules() -> dict[str, Rule]:
    """Factors s by k and c: ``c`` sums the components, ``√c · 2 / √k`` is CDKA's, but for a constant."""
    numbers, widths = _BY_NUMBER.items(), _BY_WIDTH.items()
    return {n + w: _product(of_number, of_width) for n, of_number in numbers for w, of_width in widths}


def _product(of_number: Callable[[int], float], of_width: Callable[[float], float]) -> Rule:
    return lambda k, c: of_number(c) * of_width(k)


@dataclass(frozen=True)
class Tried:
    """What a rule gave for one size.

    Attributes:
        best: The rate with the lowest validation loss.
        loss: Validation loss at the best rate of the reference.
        regret: How much of it is lost against the best of all rules and rates for this size.
    """

    best: float
    loss: float
    regret: float


@dataclass(frozen=True)
class Transfer:
    """How far the reference's best rate suits other sizes, by rule.

    Attributes:
        rate: The reference's best rate.
        sizes: Sizes that every listed rule was tried for.
        rules: By rule what it gave for every size.
    """

    rate: float
    sizes: list[Size]
    rules: dict[str, dict[Size, Tried]]

    @property
    def winner(self) -> str:
        """The rule with the least mean regret."""
        return min(self.rules, key=lambda rule: mean_regret(self.rules[rule]))


def mean_regret(of_rule: Mapping[Size, Tried]) -> float:
    """Mean over the sizes."""
    return fmean(tried.regret for tried in of_rule.values())


def transfer(report: Report) -> Transfer | None:
    """Compares rules of scaling by the validation losses of a suite's sweeps.

    A rule takes part if every size has a method with its factor and a loss at the reference's best rate; a
    size for which no rule has one is left out.

    Args:
        report: Of a suite with servable updates of several scalings, one of which is the reference.

    Returns:
        The comparison; None if no size has two scalings, or nothing can be compared yet.
    """
    entries = {row.entry.name: row.entry for row in report.rows}
    losses: dict[Size, dict[float, dict[float, float]]] = {}  # size, factor, rate
    for method in report.suite.methods:
        if (sized := _size(method.adapter)) is not None and method.name in entries:
            losses.setdefault(sized[0], {})[sized[1]] = _losses(entries[method.name])
    reference = entries.get(report.suite.reference or "")
    if reference is None or reference.rate is None or all(len(tried) < 2 for tried in losses.values()):
        return None
    by_rule: dict[str, dict[Size, Tried]] = {}
    for name, rule in rules().items():
        tried = {
            size: _tried(by_factor, rule(math.sqrt(size[0]), size[1]), reference.rate)
            for size, by_factor in losses.items()
        }
        by_rule[name] = {size: one for size, one in tried.items() if one is not None}
    sizes = sorted(set().union(*by_rule.values()))
    complete = {name: tried for name, tried in by_rule.items() if len(tried) == len(sizes) > 1}
    return Transfer(reference.rate, sizes, complete) if complete else None


def markdown(found: Transfer) -> str:
    """The comparison as a table."""
    heads = ["s", *(f"rank {rank} × {count}" for rank, count in found.sizes), "mean regret", "worst"]
    lines = ["# Which scaling keeps its learning rate", ""]
    lines += [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    for name, tried in sorted(found.rules.items(), key=lambda item: mean_regret(item[1])):
        cells = [f"{one.best:g}: {one.loss:.4f} (+{one.regret:.4f})" for _, one in sorted(tried.items())]
        worst = max(one.regret for one in tried.values())
        lines.append(f"| {name} | {' | '.join(cells)} | {mean_regret(tried):.4f} | {worst:.4f} |")
    lines += [
        "",
        f"By rule and size: its best learning rate, and the validation loss at {found.rate:g}, the best rate "
        "of the reference, with what is lost against the best of all rules and rates for that size (regret). "
        "s is the factor for c components of rank k². "
        f"Least mean regret: {found.winner}.",
    ]
    return "\n".join(lines) + "\n"


def _size(adapter: Settings) -> tuple[Size, float] | None:
    """Size and factor of a servable update; None for other methods."""
    if adapter.get("filters") != SERVABLE:
        return None
    config = MokaConfig(**adapter)
    if config.rank is None or config.start != "zero":
        return None
    return (config.rank, config.components), config.effective_scaling


def _losses(entry: Entry) -> dict[float, float]:
    return {trial.rate: trial.loss for trial in entry.trials if trial.loss is not None}


def _tried(by_factor: Mapping[float, Mapping[float, float]], factor: float, rate: float) -> Tried | None:
    own = next((losses for s, losses in by_factor.items() if math.isclose(s, factor, rel_tol=1e-3)), {})
    if rate not in own:
        return None
    lowest = min(loss for losses in by_factor.values() for loss in losses.values())
    return Tried(min(own, key=lambda tried: own[tried]), own[rate], own[rate] - lowest)
