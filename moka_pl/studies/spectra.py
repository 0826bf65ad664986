"""Singular values and effective ranks of trained updates; ``scripts/spectra.py`` runs it."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.errors import AdapterError
from moka_pl.ops.spectrum import Spectrum, spectrum_of
from moka_pl.studies.common import Parser, one_line_errors, write_json
from moka_pl.studies.outputs import (
    REPLACED,
    REPLACED_PICTURE,
    has_keys,
    json_output,
    picture_output,
    save_figure,
)

DESCRIPTION = """\
Prints effective ranks of trained updates, and draws their singular spectra.

    python scripts/spectra.py lightning_logs/smollm2/version_0/adapters/best other_adapter \\
        --json spectra.json --figure spectra.png

Loads each adapter with its base and prints, layer by layer, the numerical, stable and entropy rank of ΔW and
its Frobenius norm. The figure shows the mean spectrum of each adapter, relative to its largest value.
"""

#: Singular values that are kept of a mean spectrum, closest together at the largest.
POINTS = 64


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
        raise AdapterError(
            "an update holds a NaN or an infinity: its training diverged. Use an earlier adapter"
        )
    sizes = torch.linalg.svdvals(matrix.detach().to("cpu", torch.float64))  # (min(m, n),)
    # Factors of single precision leave that much of their rounding in a product.
    precision = torch.finfo(matrix.dtype if matrix.dtype.is_floating_point else torch.float32).eps
    return spectrum_of(sizes, max(matrix.shape), precision)


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


def spectra_summary(model: nn.Module) -> dict[str, Any]:
    """Effective ranks of every adapted layer's ΔW and the mean spectrum of every kind of layer.

    Args:
        model: The trained model.

    Returns:
        ``layers``: names; ``stable_rank``, ``entropy_rank`` and ``norm`` of each; ``kinds``: by the last part
        of the layers' names ``index`` (of singular values, from 1) and ``size`` (σ_i / σ_1, mean over the
        layers). Empty lists where no layer has an update of its own.
    """
    layers = dict(model_spectra(model))
    kinds: dict[str, list[Spectrum]] = {}
    for name, spectrum in layers.items():
        if spectrum.rank:
            kinds.setdefault(name.rpartition(".")[2], []).append(spectrum)
    return {
        "layers": list(layers),
        "stable_rank": [round(spectrum.stable_rank, 3) for spectrum in layers.values()],
        "entropy_rank": [round(spectrum.entropy_rank, 3) for spectrum in layers.values()],
        "norm": [round(spectrum.norm, 4) for spectrum in layers.values()],
        "kinds": {kind: _mean_spectrum(spectra) for kind, spectra in kinds.items()},
    }


def _mean_spectrum(spectra: Sequence[Spectrum]) -> dict[str, list[float]]:
    length = min(len(spectrum.sizes) for spectrum in spectra)
    index = sorted({round(math.exp(math.log(length) * i / (POINTS - 1))) for i in range(POINTS)})
    sizes = [fmean(float(s.sizes[i - 1] / s.sizes[0]) for s in spectra) for i in index]
    return {"index": [float(i) for i in index], "size": [float(f"{size:.3g}") for size in sizes]}


@one_line_errors("spectra")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints Markdown tables, writes JSON and a figure.

    Args:
        arguments: Default: the process's.
    """
    from moka_pl.inference import load_model

    parser = Parser("spectra", DESCRIPTION)
    parser.add_argument("adapters", type=Path, nargs="+", help="adapter directories")
    parser.add_argument(
        "--base", help="name or path of the base model (default: the one stored with the adapter)"
    )
    parser.add_argument(
        "--json", type=json_output(_are_spectra), help=f"JSON file for all numbers; {REPLACED}"
    )
    parser.add_argument(
        "--figure", type=picture_output, help=f"picture of the mean spectra; {REPLACED_PICTURE}"
    )
    args = parser.parse_args(arguments)
    spectra: dict[str, dict[str, Spectrum]] = {}
    for path in args.adapters:
        model, _ = load_model(path, "cpu", args.base)
        spectra[str(path)] = dict(model_spectra(model))
        print(f"\n{path}\n\n{markdown(spectra[str(path)])}")
    if args.json:
        write_json(
            args.json,
            {
                adapter: {
                    name: spec._asdict() | {"sizes": [float(f"{s:.4g}") for s in spec.sizes.tolist()]}
                    for name, spec in layers.items()
                }
                for adapter, layers in spectra.items()
            },
        )
    if args.figure:
        draw(spectra, args.figure)


def _are_spectra(content: Any) -> bool:
    """Whether a JSON value is what :func:`main` writes: the spectra of adapters' layers."""
    return (
        isinstance(content, dict)
        and bool(content)
        and all(
            isinstance(layers, dict) and layers and all(map(has_keys(*Spectrum._fields), layers.values()))
            for layers in content.values()
        )
    )


def markdown(layers: Mapping[str, Spectrum]) -> str:
    """A table with a line a layer, and the means of every kind of layer below."""
    lines = ["| layer | rank | stable rank | entropy rank | norm |", "|---|---|---|---|---|"]
    for name, spec in layers.items():
        lines.append(
            f"| {name} | {spec.rank} | {spec.stable_rank:.2f} | {spec.entropy_rank:.2f} | {spec.norm:.3g} |"
        )
    for kind in sorted({name.rpartition(".")[2] for name in layers}):
        of_kind = [spec[1:] for name, spec in layers.items() if name.endswith(kind)]
        means = [fmean(values) for values in zip(*of_kind, strict=True)]
        lines.append(f"| **{kind}, mean** | " + " | ".join(f"{value:.3g}" for value in means) + " |")
    return "\n".join(lines)


def draw(spectra: Mapping[str, Mapping[str, Spectrum]], file: Path) -> None:
    """Draws the mean relative spectrum of every adapter, cut to the length of the smallest layer's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100, layout="constrained")
    axis = figure.subplots()
    for adapter, layers in spectra.items():
        trained = [spec.sizes for spec in layers.values() if spec.rank]
        if not trained:
            continue
        length = min(len(sizes) for sizes in trained)
        mean = torch.stack([sizes[:length] / sizes[0] for sizes in trained]).mean(0)  # (length,)
        axis.semilogy(range(1, length + 1), mean.clamp(min=1e-8), label=adapter)
    axis.set_xlabel("i")
    axis.set_ylabel("σ_i / σ_1, mean over layers")
    axis.legend(fontsize=7)
    save_figure(figure, file)
