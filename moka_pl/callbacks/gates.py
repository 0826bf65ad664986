"""Logs the gates α_i of every layer, as scalars and as a heat map, and warns when they collapse."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from moka_pl._compat import event_writer
from moka_pl.adapters import MokaLinear, moka_layers
from moka_pl.callbacks.checkpoints import is_trial
from moka_pl.callbacks.throughput import log_interval
from moka_pl.ops.gating import Gating, can_move, gates_of, normalised_entropy
from moka_pl.training.module import MokaModule

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

#: Share of the run after which gates that are still uniform are worth a warning.
_LATE = 0.5
#: Normalised entropy above which gates count as uniform: every α_i within about 0.7% of 1/r.
_UNIFORM = 1 - 1e-5
#: Distance of Σ α from its start at 1 below which the gates count as uniform.
_STILL = 0.007
#: Share of the largest gate above which a layer counts as collapsed to one component.
_SINGLE = 0.99


class GateMonitor(Callback):
    """Logs α_i of every layer and component, their entropy, and a heat map of layers × components.

    Nothing is logged of a single component with ``gating: softmax``, whose gate is always 1.

    Tags:
        ``gate/<layer>/alpha_<i>``: α_i, from 0 to 1, or to 2/r with ``gating: sigmoid``.
        ``gate_entropy/<layer>`` and ``gate_entropy/mean``: −Σ p_i ln p_i / ln r with p = α / Σ α, 1 for
        uniform gates, 0 for a single component.
        ``gate_sum/<layer>`` and ``gate_sum/mean``: Σ α, from 0 to 2, 1 at the start; with ``gating:
        sigmoid`` only (with ``softmax`` it is always 1).
        ``gate_heatmap``: image of all gates, one row per layer, at every validation.

    Args:
        every_n_steps: Optimizer steps between logs; ``null`` takes the trainer's ``log_every_n_steps``.
        heatmap: Whether to draw the image.
    """

    def __init__(self, every_n_steps: int | None = None, heatmap: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.heatmap = heatmap
        self._labels: list[str] = []
        self._last_step = -1
        self._warned: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the initial gates."""
        self._labels = layer_labels(list(_layers(pl_module)))
        self._log(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Logs the gates at the chosen interval."""
        every = self.every_n_steps or log_interval(trainer)
        if trainer.global_step % every == 0 and trainer.global_step != self._last_step:
            self._log(trainer, pl_module)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the heat map, and warns about uniform or collapsed gates."""
        if trainer.sanity_checking or not trainer.is_global_zero or not self._labels:
            return
        gates = gate_matrix(pl_module)
        if gates is None:
            return
        if self.heatmap:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    image = gate_heatmap(gates, self._labels)
                    logger.experiment.add_image("gate_heatmap", image, trainer.global_step, dataformats="HWC")
        self._warn(trainer, gates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the final gates."""
        if trainer.global_step != self._last_step:
            self._log(trainer, pl_module)

    def _log(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last_step = trainer.global_step
        if not trainer.is_global_zero or not trainer.loggers:
            return
        gates = gate_matrix(pl_module)
        if gates is None:
            return
        values = gate_scalars(gates, self._labels, _gating(pl_module))
        for logger in trainer.loggers:
            log_scalars(logger, values, trainer.global_step)

    def _warn(self, trainer: Trainer, gates: Tensor) -> None:
        # Sigmoid gates that have all gone up or down together have learnt, too.
        uniform = (normalised_entropy(gates) > _UNIFORM) & ((gates.sum(1) - 1).abs() < _STILL)
        total = trainer.estimated_stepping_batches
        late = trainer.global_step >= _LATE * total and not is_trial(trainer)
        if late and gates.shape[1] > 1 and bool(uniform.all()):
            self._warn_once(
                "uniform",
                f"all gates are still uniform after {trainer.global_step} of {total} steps. Raise the "
                "learning rate or learning_rate_ratios.gate, or set gating: none to save their parameters",
            )
        single = gates.amax(1) > _SINGLE * gates.sum(1)
        if gates.shape[1] > 1 and bool(single.any()):
            self._warn_once(
                "single",
                f"one component has the whole gate in {int(single.sum())} of {len(single)} layers "
                f"(first {self._labels[int(single.int().argmax())]}), so the others no longer learn. Lower "
                "the learning rate or use fewer components",
            )

    def _warn_once(self, reason: str, message: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            rank_zero_warn(message)


def layer_labels(names: list[str]) -> list[str]:
    """Returns short labels; layers that would share one (the experts of a layer) keep their names."""
    short = [_layer_label(name) for name in names]
    count = Counter(short)
    return [label if count[label] == 1 else name for label, name in zip(short, names, strict=True)]


def _layer_label(name: str) -> str:
    """Shortens a module name for tags: ``model.layers.3.self_attn.q_proj`` → ``layer03.q_proj``."""
    parts = name.split(".")
    number = next((part for part in parts if part.isdigit()), None)
    return f"layer{int(number):02d}.{parts[-1]}" if number is not None else name


def gate_matrix(pl_module: LightningModule) -> Tensor | None:
    """Returns all gates, (layers, r), on the CPU, by a single copy; None without gates that can move."""
    logits = [layer.moka_gate for layer in _layers(pl_module).values() if layer.moka_gate is not None]
    if not logits or not can_move(_gating(pl_module), len(logits[0])):
        return None
    with torch.no_grad():
        return gates_of(torch.stack(list(logits)).float(), _gating(pl_module)).cpu()  # (layers, r)


def gate_scalars(gates: Tensor, labels: list[str], gating: Gating) -> dict[str, float]:
    """Returns the scalars of one step by tag.

    Args:
        gates: α, shape (layers, r).
        labels: One name a layer.
        gating: How gate logits make α.
    """
    columns = {"gate_entropy": normalised_entropy(gates)}  # (layers,)
    if gating == "sigmoid":
        columns["gate_sum"] = gates.sum(1)  # (layers,)
    values = {}
    for tag, column in columns.items():
        values[f"{tag}/mean"] = float(column.mean())
        values |= {f"{tag}/{label}": value for label, value in zip(labels, column.tolist(), strict=True)}
    for label, row in zip(labels, gates.tolist(), strict=True):
        values |= {f"gate/{label}/alpha_{i}": alpha for i, alpha in enumerate(row)}
    return values


def gate_heatmap(gates: Tensor, labels: list[str]) -> "npt.NDArray[np.uint8]":
    """Draws the gates α, (layers, r), with one label a layer; returns the picture, (height, width, 3)."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(1.5 + 0.45 * gates.shape[1], 1.2 + 0.16 * gates.shape[0]), dpi=90)
    canvas = FigureCanvasAgg(figure)
    axes: Any = figure.subplots()
    image = axes.imshow(gates.numpy(), aspect="auto", cmap="viridis")
    axes.set_xticks(range(gates.shape[1]), [str(i) for i in range(gates.shape[1])])
    axes.set_yticks(range(len(labels)), labels, fontsize=6)
    axes.set_xlabel("component i")
    axes.set_title(f"gates α_i (start: {1 / gates.shape[1]:.3f})", fontsize=9)
    figure.colorbar(image)
    figure.tight_layout()
    canvas.draw()  # type: ignore[no-untyped-call]
    picture: npt.NDArray[np.uint8] = np.asarray(canvas.buffer_rgba())  # type: ignore[no-untyped-call]
    return picture[..., :3].copy()


def log_scalars(logger: Logger, values: Mapping[str, float], step: int) -> None:
    """Logs all values of a step; for TensorBoard as a single event, many times faster than one for each.

    Args:
        logger: Any of Lightning's loggers.
        values: Values by tag.
        step: The optimizer step.
    """
    if not isinstance(logger, TensorBoardLogger):
        logger.log_metrics(dict(values), step=step)
        return
    from tensorboard.compat.proto.summary_pb2 import Summary

    rows = [Summary.Value(tag=tag, simple_value=value) for tag, value in values.items()]
    writer = event_writer(logger.experiment)
    writer.add_summary(Summary(value=rows), global_step=step)


def _gating(pl_module: LightningModule) -> Gating:
    """Returns the layers' gating; all have the same."""
    return next(iter(_layers(pl_module).values())).gating


def _layers(pl_module: LightningModule) -> dict[str, MokaLinear]:
    assert isinstance(pl_module, MokaModule)
    return moka_layers(pl_module.causal_lm)
