#!/usr/bin/env python3
"""Effective ranks and singular spectra of trained updates.

    python scripts/spectra.py lightning_logs/smollm2/version_0/adapters/best other_adapter \
        --json spectra.json --figure spectra.png

Loads each adapter with its base and prints, layer by layer, the numerical, stable and entropy rank of ΔW and
its Frobenius norm. The figure shows the mean spectrum of each adapter, relative to its largest value.
"""

import argparse
import json
from pathlib import Path
from statistics import mean

import torch

from moka_pl.inference import load_model
from moka_pl.studies.spectra import Spectrum, model_spectra


def draw(spectra: dict[str, dict[str, Spectrum]], file: Path) -> None:
    """Draws the mean relative spectrum of every adapter, layers of the smallest size cut to one length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), dpi=100)
    axis = figure.subplots()
    for adapter, layers in spectra.items():
        trained = [spec.sizes for spec in layers.values() if spec.rank]
        if not trained:
            continue
        length = min(len(sizes) for sizes in trained)
        curve = torch.stack([sizes[:length] / sizes[0] for sizes in trained]).mean(0)
        axis.semilogy(range(1, length + 1), curve.clamp(min=1e-8), label=adapter)
    axis.set_xlabel("i")
    axis.set_ylabel("σ_i / σ_1, mean over layers")
    axis.legend(fontsize=7)
    figure.set_layout_engine("constrained")
    figure.savefig(file)


def main() -> None:
    """Prints Markdown tables, writes JSON and a figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("adapters", type=Path, nargs="+", help="adapter directories")
    parser.add_argument("--base", help="where the base model lies, if not under its remembered name")
    parser.add_argument("--json", type=Path, help="file to write all numbers to")
    parser.add_argument("--figure", type=Path, help="PNG to draw the mean spectra into")
    args = parser.parse_args()
    spectra: dict[str, dict[str, Spectrum]] = {}
    for path in args.adapters:
        model, _ = load_model(path, "cpu", args.base)
        spectra[str(path)] = layers = dict(model_spectra(model))
        print(f"\n{path}\n\n| layer | rank | stable rank | entropy rank | norm |\n|---|---|---|---|---|")
        for name, spec in layers.items():
            print(
                f"| {name} | {spec.rank} | {spec.stable_rank:.2f} | {spec.entropy_rank:.2f} "
                f"| {spec.norm:.3g} |"
            )
        kinds = {name.rpartition(".")[2] for name in layers}
        for kind in sorted(kinds):
            own = [spec for name, spec in layers.items() if name.endswith(kind)]
            means = [mean(values) for values in zip(*(spec[1:] for spec in own), strict=True)]
            print(f"| **{kind}, mean** | " + " | ".join(f"{value:.3g}" for value in means) + " |")
    if args.json:
        told = {
            adapter: {
                name: spec._asdict() | {"sizes": [float(f"{s:.4g}") for s in spec.sizes.tolist()]}
                for name, spec in layers.items()
            }
            for adapter, layers in spectra.items()
        }
        args.json.write_text(json.dumps(told) + "\n", encoding="utf-8")
    if args.figure:
        draw(spectra, args.figure)


if __name__ == "__main__":
    main()
