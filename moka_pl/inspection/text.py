"""The numbers of an adapter as text, and as JSON values."""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from moka_pl.adapters.methods.base import name_ranks
from moka_pl.adapters.metric_table import metric_table
from moka_pl.errors import printable
from moka_pl.inspection.comparison import Comparison, LayerDifference
from moka_pl.inspection.report import Inspection, LayerNumbers

#: Singular values that are kept of a spectrum, closest together at the largest.
_POINTS = 64
_UNKNOWN = "–"


def facts_of(found: Inspection) -> dict[str, str]:
    """Returns base, options and sizes by name."""
    info, ranks = found.info, found.info.exact_lora_rank
    step, measured = info.extra.get("step"), found.metrics_step
    facts = {
        "base model": f"{info.base.name} (fingerprint {info.base.fingerprint})",
        "quantization": info.base.options.get("quantization", "none"),
        **found.method.facts(),
        **({"exact LoRA rank": name_ranks(ranks)} if ranks else {}),
        "parameters": f"{found.parameters:,}",
    }
    if measured != step:
        facts["metrics measured at step"] = f"{measured} (weights: step {step})"
    return {printable(name): printable(str(value)) for name, value in facts.items()}


def as_text(found: Inspection) -> str:
    """Writes facts, metrics, gates and updates as tables."""
    facts = facts_of(found)
    width = max(30, *(len(name) + 2 for name in facts))
    parts = ["\n".join(f"{name:<{width}}{value}" for name, value in facts.items())]
    if metrics := found.info.extra.get("metrics"):
        table = metric_table(metrics)
        parts.append(_table(f"metrics {table.title}".rstrip(), table.columns, table.rows, 16))
    if gated := found.gated:
        lines = [f"{'gates by layer':<44}{'entropy':>8}  α_1 … α_{len(gated[0].alpha)}"]
        for layer in gated:
            alpha = " ".join(f"{a:.3f}" for a in layer.alpha.tolist())
            lines.append(f"{printable(layer.name):<44}{layer.entropy:>8.4f}  {alpha}")
        parts.append("\n".join(lines))
    if numbers := [n for n in found.layers if n.norm is not None]:
        parts.append(_updates(numbers))
    if found.left_out:
        parts.append("\n".join(["left out", *(f"  {printable(sentence)}" for sentence in found.left_out)]))
    return "\n\n".join(parts)


def _updates(numbers: Sequence[LayerNumbers]) -> str:
    """A table with a row a layer, and the means of every projection below."""
    columns = ["‖ΔW‖", "‖ΔW‖/‖W‖", "stable rank", "entropy rank", "LoRA rank"]
    rows = [(n.name, _cells([n])) for n in numbers]
    if max(len(n.component_norms) for n in numbers) > 1:
        columns.append("  norms of components")
        for (_, cells), n in zip(rows, numbers, strict=True):
            cells.append("  " + " ".join(f"{norm:<6.3g}" for norm in n.component_norms).rstrip())
    kinds: dict[str, list[LayerNumbers]] = {}
    for n in numbers:
        kinds.setdefault(n.layer.kind, []).append(n)
    rows += [(f"mean of {len(of)}: {kind}", _cells(of)) for kind, of in kinds.items() if len(of) > 1]
    if all(cells[1] == _UNKNOWN for _, cells in rows):  # without the base
        rows, columns = [(name, cells[:1] + cells[2:]) for name, cells in rows], columns[:1] + columns[2:]
    return _table("updates by layer", columns, rows, 14)


def _cells(of: Sequence[LayerNumbers]) -> list[str]:
    """Norms and ranks of a layer, or their means over several."""
    spectra = [n.spectrum.entropy_rank for n in of if n.spectrum is not None]
    columns = (
        [n.norm for n in of],
        [n.relative_norm for n in of],
        [n.stable_rank for n in of],
        spectra,
        [n.exact_lora_rank for n in of],
    )
    return _numbers(*(mean([v for v in column if v is not None]) for column in columns))


def mean(values: Sequence[float]) -> float | None:
    """The mean; None of nothing."""
    return fmean(values) if values else None


def _numbers(*values: float | None) -> list[str]:
    return [_UNKNOWN if value is None else f"{value:.4g}" for value in values]


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, list[str]]], cell: int) -> str:
    names = [printable(name) for name, _ in rows]
    width = max(44 if cell < 16 else 28, len(title) + 1, *(len(name) + 1 for name in names))
    lines = [f"{title:<{width}}" + "".join(f"{column:>{cell}}" for column in columns)]
    for name, (_, cells) in zip(names, rows, strict=True):
        lines.append(f"{name:<{width}}" + "".join(f"{text:>{cell}}" for text in cells))
    return "\n".join(line.rstrip() for line in lines)


def comparison_text(first: Path, second: Path, compared: Comparison) -> str:
    """Writes two adapters' comparison as a table.

    Args:
        first: The first adapter's directory.
        second: The second's.
        compared: What they have in common.
    """
    lines = [f"{first} and {second}", *compared.notes]
    parts = ["\n".join(map(printable, lines))]
    if compared.layers:
        rows = [(d.name, _difference_cells(d)) for d in compared.layers]
        columns = ["‖ΔW‖", "‖ΔW'‖", "cosine", "distance", "gates"]
        parts.append(_table("compared by layer", columns, rows, 11))
    return "\n\n".join(parts)


def _difference_cells(d: LayerDifference) -> list[str]:
    return _numbers(*d.norms, d.cosine, d.distance, d.gate_distance)


def as_json(found: Inspection) -> dict[str, Any]:
    """Returns JSON values of everything; singular values at 64 of their indices."""
    info = found.info
    return {
        "base_model": info.base.name,
        "base_fingerprint": info.base.fingerprint,
        "quantization": info.base.options.get("quantization", "none"),
        "method": found.method.title,
        "options": found.method.options(),
        "exact_lora_rank": info.exact_lora_rank or None,
        "parameters": found.parameters,
        "metrics": info.extra.get("metrics") or {},
        "metrics_step": found.metrics_step,
        "step": info.extra.get("step"),
        "gates": {layer.name: layer.alpha.tolist() for layer in found.gated},
        "layers": {numbers.name: _layer_json(numbers) for numbers in found.layers},
        "left_out": found.left_out,
    }


def _layer_json(numbers: LayerNumbers) -> dict[str, Any]:
    layer, spectrum, update = numbers.layer, numbers.spectrum, numbers.layer.update
    return {
        "size": None if update is None else [update.m, update.n],
        "shapes": [str(shape) for shape in layer.shapes],
        "alpha": layer.alpha.tolist(),
        "gate_entropy": layer.entropy,
        "component_norms": numbers.component_norms or None,
        "norm": numbers.norm,
        "relative_norm": numbers.relative_norm,
        "stable_rank": numbers.stable_rank,
        "entropy_rank": None if spectrum is None else spectrum.entropy_rank,
        "numerical_rank": None if spectrum is None else spectrum.rank,
        "exact_lora_rank": numbers.exact_lora_rank,
        "singular_values": None if spectrum is None else dict(sampled(spectrum.sizes)),
    }


def sampled(sizes: Tensor) -> list[tuple[int, float]]:
    """Some singular values with their indices from 1, closest together at the largest."""
    length = len(sizes)
    indices = sorted({round(math.exp(math.log(length) * i / (_POINTS - 1))) for i in range(_POINTS)})
    return [(index, float(f"{float(sizes[index - 1]):.4g}")) for index in indices]


def comparison_json(second: Path, compared: Comparison) -> dict[str, Any]:
    """Returns JSON values of a comparison.

    Args:
        second: The other adapter's directory.
        compared: What the two have in common.
    """
    layers = {
        d.name: {
            "norms": list(d.norms),
            "cosine": d.cosine,
            "distance": d.distance,
            "gate_differences": d.gates or None,
            "gate_distance": d.gate_distance,
        }
        for d in compared.layers
    }
    return {"with": str(second), "layers": layers, "notes": compared.notes}
