"""The picture of all gates: a panel a projection, layers downwards, components by their shapes."""

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from moka_pl.callbacks.gate_tags import GatedLayer

if TYPE_CHECKING:
    from tensorboard.compat.proto.summary_pb2 import Summary

#: Width in pixels of the cards in which TensorBoard shows images, so that it need not shrink them.
_WIDTH = 328
_DPI = 100
#: Least distance from 1/r that has the full colour, as a factor: gates that hardly move stay pale.
_LEAST = 1.05
#: Largest: beyond it colours stay the same.
_MOST = 8.0
#: Most rows that are all labelled.
_MOST_LABELS = 16


def gate_heatmaps(gates: Tensor, layers: Sequence[GatedLayer]) -> "dict[str, Summary.Image]":
    """Draws the gates α, (layers, r): a picture for each projection, all in the same colours.

    White is 1/r; red gates are larger, blue ones smaller, by equal factors in equal colours.

    Args:
        gates: α, shape (layers, r).
        layers: The layers.
    """
    from tensorboard.compat.proto.summary_pb2 import Summary

    ratios = (gates * gates.shape[1]).clamp(min=1 / _MOST, max=_MOST).log2()  # (layers, r)
    limit = max(math.log2(_LEAST), float(ratios.abs().max()))
    pictures = {}
    for name in dict.fromkeys(layer.projection for layer in layers):
        rows = [row for row, layer in enumerate(layers) if layer.projection == name]
        png, width, height = _draw(ratios[rows], [layers[row] for row in rows], limit)
        pictures[name] = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=png)
    return pictures


def _draw(ratios: Tensor, layers: Sequence[GatedLayer], limit: float) -> tuple[bytes, int, int]:
    """Draws one projection; returns the PNG, its width and its height."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    count, r = ratios.shape
    height = 150 + min(12 * count, max(260, 5 * count))
    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(_WIDTH / _DPI, height / _DPI), dpi=_DPI, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    image = axes.imshow(ratios.numpy(), aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit)
    alike = len({tuple(map(str, layer.shapes)) for layer in layers}) == 1
    names = [str(shape) for shape in layers[0].shapes] if alike else [str(i) for i in range(r)]
    axes.set_xticks(range(r), names, fontsize=7, rotation=90 if alike else 0)
    every = math.ceil(count / _MOST_LABELS)
    labels = [layer.row.removeprefix("layer").lstrip("0") or "0" for layer in layers]
    axes.set_yticks(range(0, count, every), labels[::every], fontsize=7)
    axes.set_ylabel("layer", fontsize=8)
    axes.set_title(f"α of {layers[0].projection}", fontsize=9)
    bar = figure.colorbar(image, ax=axes, ticks=[-limit, -limit / 2, 0, limit / 2, limit], pad=0.02)
    bar.ax.set_yticklabels([f"{2.0 ** (part * limit) / r:.3g}" for part in (-1, -0.5, 0, 0.5, 1)], fontsize=7)
    canvas.draw()  # type: ignore[no-untyped-call]
    pixels: Any = canvas.buffer_rgba()  # type: ignore[no-untyped-call]
    picture = Image.fromarray(np.asarray(pixels)).convert("RGB")
    file = io.BytesIO()
    picture.quantize(160).save(file, "PNG", optimize=True)
    return file.getvalue(), picture.width, picture.height
