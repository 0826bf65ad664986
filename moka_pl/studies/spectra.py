"""Singular values of trained updates, and the effective ranks that they have.

For ΔW with singular values σ_1 ≥ σ_2 ≥ … and shares p_i = σ_i² / Σ_j σ_j²:
    stable rank     ‖ΔW‖_F² / ‖ΔW‖_2² = 1 / p_1
    entropy rank    exp(−Σ_i p_i ln p_i): the number of equal singular values with that entropy
    rank            number of σ_i above σ_1 · max(m, n) · ε, ε of the computing dtype

1 ≤ stable rank ≤ entropy rank ≤ rank ≤ min(m, n), all equal for equal singular values.

Sources: O. Roy and M. Vetterli, "The effective rank" (2007), here of the squared singular values; M. Rudelson
and R. Vershynin, "Sampling from large matrices" (2007), for the stable rank.
"""

import math
from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moka_pl.errors import AdapterError


class Spectrum(NamedTuple):
    """Singular values and effective ranks of one matrix.

    Attributes:
        sizes: Singular values, descending, (min(m, n),), float64.
        rank: Numerical rank; 0 for a zero matrix, as are all ranks.
        stable_rank: Energy over the energy of the leading direction.
        entropy_rank: Exponential of the entropy of the directions' shares of energy.
        norm: Frobenius norm.
    """

    sizes: Tensor
    rank: int
    stable_rank: float
    entropy_rank: float
    norm: float


def spectrum(matrix: Tensor) -> Spectrum:
    """Computes singular values and effective ranks in float64.

    Args:
        matrix: Any matrix, such as ΔW, shape (m, n).

    Returns:
        Its spectrum.

    Raises:
        AdapterError: If the matrix has entries that are not finite.
    """
    if not torch.isfinite(matrix).all():
        raise AdapterError("an update has entries that are not finite; the training has diverged")
    sizes = torch.linalg.svdvals(matrix.detach().to("cpu", torch.float64))  # (min(m, n),)
    energy = sizes.square()
    total = float(energy.sum())
    if total == 0:
        return Spectrum(sizes, 0, 0.0, 0.0, 0.0)
    shares = energy / total
    entropy = -float(torch.special.xlogy(shares, shares).sum())
    # Factors of single precision leave that much of their rounding in a product.
    precision = torch.finfo(matrix.dtype if matrix.dtype.is_floating_point else torch.float32).eps
    rank = int((sizes > sizes[0] * max(matrix.shape) * precision).sum())
    return Spectrum(sizes, rank, 1 / float(shares[0]), float(torch.tensor(entropy).exp()), total**0.5)


def model_spectra(model: nn.Module) -> Iterator[tuple[str, Spectrum]]:
    """Yields name and spectrum of every adapted layer's ΔW, one after another.

    Args:
        model: A model whose adapted layers have ``get_delta_weight()`` (MoKA's own), or ``get_delta_weight``
            of an adapter's name (PEFT's).
    """
    for name, layer in model.named_modules():
        delta = getattr(layer, "get_delta_weight", None)
        if not callable(delta):
            continue
        active = getattr(layer, "active_adapters", None)
        with torch.no_grad():
            parts = [delta()] if active is None else [delta(adapter) for adapter in active]
        yield name, spectrum(torch.stack(parts).sum(0))


# The ranks that trained updates have, small enough for a report.


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
