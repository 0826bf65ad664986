"""The ranks that trained updates have, averaged over layers and seeds."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

_RANKS = ("stable_rank", "entropy_rank")


@dataclass(frozen=True)
class Ranks:
    """Effective ranks of a rival's ΔW.

    Attributes:
        stable: Mean stable rank over layers and seeds, and its standard deviation over the seeds.
        entropy: The same of the entropy rank.
        norm: The same of the Frobenius norm.
        kinds: Means of the stable and the entropy rank by kind of layer.
        spectra: Mean of σ_i / σ_1 by kind of layer, at some ``index`` i from 1.
    """

    stable: tuple[float, float]
    entropy: tuple[float, float]
    norm: tuple[float, float]
    kinds: dict[str, tuple[float, float]]
    spectra: dict[str, dict[str, list[float]]]


def mean_ranks(seeds: Sequence[dict[str, Any]]) -> Ranks | None:
    """The means over seeds.

    Args:
        seeds: What `moka_pl.studies.spectra_part.spectra_summary` found, by seed.

    Returns:
        The means; None where no layer has an update.
    """
    if not seeds or not seeds[0]["layers"]:
        return None
    names = seeds[0]["layers"]
    kinds = {}
    for kind in dict.fromkeys(name.rpartition(".")[2] for name in names):
        own = [i for i, name in enumerate(names) if name.rpartition(".")[2] == kind]
        means = [fmean(seed[which][i] for seed in seeds for i in own) for which in _RANKS]
        kinds[kind] = (round(means[0], 3), round(means[1], 3))
    stable, entropy, norm = (
        _over_seeds([fmean(seed[which]) for seed in seeds]) for which in (*_RANKS, "norm")
    )
    spectra = {kind: _mean_spectrum([seed["kinds"].get(kind) for seed in seeds]) for kind in kinds}
    return Ranks(stable, entropy, norm, kinds, {k: found for k, found in spectra.items() if found})


def _over_seeds(values: Sequence[float]) -> tuple[float, float]:
    return round(fmean(values), 4), round(stdev(values), 4) if len(values) > 1 else 0.0


def _mean_spectrum(spectra: Sequence[dict[str, list[float]] | None]) -> dict[str, list[float]]:
    known = [spectrum for spectrum in spectra if spectrum]
    if not known or any(spectrum["index"] != known[0]["index"] for spectrum in known):
        return {}
    sizes = zip(*(spectrum["size"] for spectrum in known), strict=True)
    return {"index": known[0]["index"], "size": [float(f"{fmean(values):.3g}") for values in sizes]}
