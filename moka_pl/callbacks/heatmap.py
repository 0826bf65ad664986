"""The gate heat map: layers × components as an image."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


def gate_heatmap(gates: Tensor, labels: list[str]) -> "npt.NDArray[np.uint8]":
    """Draws the gates of all layers.

    Args:
        gates: α, shape (layers, r).
        labels: One name a layer.

    Returns:
        The picture, (height, width, 3).
    """
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(1.5 + 0.45 * gates.shape[1], 1.2 + 0.16 * gates.shape[0]), dpi=90)
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    start = 1 / gates.shape[1]
    image = axes.imshow(gates.numpy(), aspect="auto", cmap="viridis")
    axes.set_xticks(range(gates.shape[1]), [str(i) for i in range(gates.shape[1])])
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_xlabel("component i")
    axes.set_title(f"gates α_i (start: {start:.3f})", fontsize=9)
    figure.colorbar(image)
    figure.tight_layout()
    canvas.draw()  # type: ignore[no-untyped-call]
    picture: npt.NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return picture[..., :3].copy()
