"""The ranks that trained updates have, small enough for a report."""

import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import nn

from moka_pl.studies.spectra import Spectrum, model_spectra

#: Singular values that are kept of a mean spectrum, closest together at the largest.
POINTS = 64


def spectra_summary(model: nn.Module) -> dict[str, Any]:
    """Effective ranks of every adapted layer's ΔW and the mean spectrum of every kind of layer.

    Args:
        model: The trained model.

    Returns:
        ``layers``: names; ``stable_rank``, ``entropy_rank`` and ``norm`` of each; ``kinds``: by the last part
        of the layers' names ``index`` (of singular values, from 1) and ``size`` (σ_i / σ_1, mean over the
        layers). Empty lists where no layer has an update of its own.
    """
    found = dict(model_spectra(model))
    kinds: dict[str, list[Spectrum]] = {}
    for name, spectrum in found.items():
        if spectrum.rank:
            kinds.setdefault(name.rpartition(".")[2], []).append(spectrum)
    return {
        "layers": list(found),
        "stable_rank": [round(spectrum.stable_rank, 3) for spectrum in found.values()],
        "entropy_rank": [round(spectrum.entropy_rank, 3) for spectrum in found.values()],
        "norm": [round(spectrum.norm, 4) for spectrum in found.values()],
        "kinds": {kind: _mean_spectrum(spectra) for kind, spectra in kinds.items()},
    }


def _mean_spectrum(spectra: Sequence[Spectrum]) -> dict[str, list[float]]:
    length = min(len(spectrum.sizes) for spectrum in spectra)
    index = sorted({round(math.exp(math.log(length) * i / (POINTS - 1))) for i in range(POINTS)})
    sizes = [fmean(float(s.sizes[i - 1] / s.sizes[0]) for s in spectra) for i in index]
    return {"index": [float(i) for i in index], "size": [float(f"{size:.3g}") for size in sizes]}
