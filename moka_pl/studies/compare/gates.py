"""What the gates did, averaged over seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

#: Points of a course that are kept.
_POINTS = 40


@dataclass(frozen=True)
class Gates:
    """The gates of a rival.

    Attributes:
        steps: Optimizer steps.
        entropy: Mean normalised entropy over layers and seeds at each.
        shapes: Mean gate of every kind of layer and shape of component at each, 1 where it is uniform.
        final: The last of these with its standard deviation over the seeds (0 for one seed).
        final_entropy: Mean and extremes of the last entropies over layers and seeds.
    """

    steps: list[int]
    entropy: list[float | None]
    shapes: dict[str, list[float | None]]
    final: dict[str, tuple[float | None, float]]
    final_entropy: dict[str, float]


def mean_gates(seeds: Sequence[dict[str, Any]]) -> Gates | None:
    """The mean course over seeds at the steps that all of them have.

    Args:
        seeds: What `moka_pl.studies.compare.recorder.Series.gates` noted, by seed.

    Returns:
        The mean; None without any.
    """
    if not seeds:
        return None
    steps = sorted(set.intersection(*(set(seed["steps"]) for seed in seeds)))
    kept = sorted({steps[round(i * (len(steps) - 1) / (_POINTS - 1))] for i in range(_POINTS)})

    def course(series: Sequence[Sequence[float | None]]) -> list[float | None]:
        known = [dict(zip(s["steps"], values, strict=True)) for s, values in zip(seeds, series, strict=True)]
        return [_mean([values[step] for values in known]) for step in kept]

    names = [name for name in seeds[0]["shapes"] if all(name in seed["shapes"] for seed in seeds)]
    finals = {name: [seed["shapes"][name][-1] for seed in seeds] for name in names}
    last = [value for seed in seeds for value in seed["final_entropy"] if value is not None]
    return Gates(
        kept,
        course([seed["entropy"] for seed in seeds]),
        {name: course([seed["shapes"][name] for seed in seeds]) for name in names},
        {name: (_mean(values), _spread(values)) for name, values in finals.items()},
        {"mean": fmean(last), "lowest": min(last), "highest": max(last)} if last else {},
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(fmean(known), 5) if len(known) == len(values) else None


def _spread(values: Sequence[float | None]) -> float:
    known = [value for value in values if value is not None]
    return round(stdev(known), 5) if len(known) > 1 else 0.0
