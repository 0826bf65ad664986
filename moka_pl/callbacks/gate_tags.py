"""Under which names gates are logged; :mod:`moka_pl.inspection.history` reads them back."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from moka_pl.ops.gating import Gating, normalised_entropy
from moka_pl.ops.layout import Shape

#: Sorts behind ``train`` and ``val``, so that TensorBoard shows these first.
ALPHA = "α"


class GatedLayer(NamedTuple):
    """A layer whose gates are logged.

    Attributes:
        label: Its short name, ``layer03.q_proj``.
        projection: The last part of it, ``q_proj``.
        shapes: Sizes of its components.
    """

    label: str
    projection: str
    shapes: Sequence[Shape]

    @property
    def row(self) -> str:
        """What tells it from the other layers of its projection, ``layer03``."""
        return self.label.removesuffix(f".{self.projection}")

    @property
    def group(self) -> str:
        """Beginning of its curves' tags on TensorBoard: ``α q_proj/layer03/``."""
        return f"{ALPHA} {self.projection}/{self.row}/"


def layer_labels(names: Sequence[str]) -> list[str]:
    """Returns short labels; layers that would share one (the experts of a layer) keep their names."""
    short = [_layer_label(name) for name in names]
    count = Counter(short)
    return [label if count[label] == 1 else name for label, name in zip(short, names, strict=True)]


def _layer_label(name: str) -> str:
    """Shortens a module name for tags: ``model.layers.3.self_attn.q_proj`` → ``layer03.q_proj``."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    return f"layer{int(number):02d}.{parts[-1]}" if number is not None else name


def projections(layers: Sequence[GatedLayer]) -> list[str]:
    """Returns the layers' projections, each once, in the model's order."""
    return list(dict.fromkeys(layer.projection for layer in layers))


def board_scalars(gates: Tensor, layers: Sequence[GatedLayer], gating: Gating) -> dict[str, float]:
    """Returns the scalars of one step by TensorBoard's tags.

    Args:
        gates: α, shape (layers, r).
        layers: The layers.
        gating: How gate logits make α.
    """
    names = projections(layers)
    values = {}
    for kind, column in _columns(gates, gating).items():
        values[f"{ALPHA}/{kind}"] = float(column.mean())
        for name in names if len(names) > 1 else ():
            rows = [row for row, layer in enumerate(layers) if layer.projection == name]
            values[f"{ALPHA}/{kind} {name}"] = float(column[rows].mean())
        curves = zip(layers, column.tolist(), strict=True)
        values |= {f"{ALPHA} {kind}/{layer.label}": value for layer, value in curves}
    for layer, row in zip(layers, gates.tolist(), strict=True):
        named = zip(layer.shapes, row, strict=True)
        values |= {f"{layer.group}{i}: {shape}": alpha for i, (shape, alpha) in enumerate(named)}
    return values


def plain_scalars(gates: Tensor, layers: Sequence[GatedLayer], gating: Gating) -> dict[str, float]:
    """Returns the scalars of one step by the tags of other loggers, which may refuse other signs than these.

    Args:
        gates: α, shape (layers, r).
        layers: The layers.
        gating: How gate logits make α.
    """
    values = {}
    for kind, column in _columns(gates, gating).items():
        values[f"gate_{kind}/mean"] = float(column.mean())
        curves = zip(layers, column.tolist(), strict=True)
        values |= {f"gate_{kind}/{layer.label}": value for layer, value in curves}
    for layer, row in zip(layers, gates.tolist(), strict=True):
        values |= {f"gate/{layer.label}/alpha_{i}": alpha for i, alpha in enumerate(row)}
    return values


def _columns(gates: Tensor, gating: Gating) -> dict[str, Tensor]:
    """Returns one value a layer, (layers,) each, by what it is."""
    columns = {"entropy": normalised_entropy(gates)}
    return columns | {"sum": gates.sum(1)} if gating == "sigmoid" else columns
