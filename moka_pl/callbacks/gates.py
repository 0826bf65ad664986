"""Logs the gates α_i of every layer, as scalars and as heat maps, and warns when they collapse."""

import math
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from moka_pl.adapters import MokaLayer, moka_layers
from moka_pl.callbacks.board import log_scalars, write_summary
from moka_pl.callbacks.gate_tags import ALPHA, GatedLayer, board_scalars, layer_labels, plain_scalars
from moka_pl.callbacks.heatmap import gate_heatmaps
from moka_pl.callbacks.throughput import log_interval
from moka_pl.ops.gating import can_move, gates_of, normalised_entropy
from moka_pl.training.launches import HostCopy
from moka_pl.training.module import MokaModule
from moka_pl.training.trainer_state import in_training, is_trial
from moka_pl.utils import warn

#: Most bytes of a run's gate curves.
_MOST_BYTES = 40e6
#: Bytes of a logged scalar beside its tag.
_SCALAR_BYTES = 10
#: Most pictures of a run by projection; TensorBoard shows ten of them.
_MOST_PICTURES = 50
#: Optimizer steps of a run whose length is unknown.
_UNKNOWN_STEPS = 10_000
#: Share of the run after which gates that are still uniform are worth a warning.
_LATE = 0.5
#: Normalised entropy above which gates count as uniform: every α_i within about 0.7% of 1/r.
_UNIFORM = 1 - 1e-5
#: Distance of Σ α from its start at 1 below which the gates count as uniform.
_STILL = 0.007
#: Share of the largest gate above which a layer counts as collapsed to one component.
_SINGLE = 0.99


class GateMonitor(Callback):
    """Logs α_i of every layer and component, their entropy, and heat maps of layers × components.

    A single component with ``gating: softmax`` is not logged: its gate is always 1.

    Tags of TensorBoard, which sort behind losses and accuracies:
        ``α q_proj/<layer>/<i>: <shape>``: α_i, from 0 to 1, or to 2/r with ``gating: sigmoid``, such as
        ``α q_proj/layer03/4: 24×24 ⊗ 24×24``.
        ``α/entropy``, ``α/entropy <projection>`` and ``α entropy/<layer>.<projection>``: the mean over all
        layers, that over one projection's, and one layer's −Σ p_i ln p_i / ln r with p = α / Σ α, 1 for
        uniform gates, 0 for a single component.
        ``α/sum …`` and ``α sum/…``: likewise Σ α, from 0 to 2, 1 at the start; with ``gating: sigmoid``
        only (with ``softmax`` it is always 1).
        ``α/heat map <projection>``: image of a projection's gates, one row per layer, at validations and at
        the end.

    Other loggers get ``gate/<layer>.<projection>/alpha_<i>``, ``gate_entropy/mean``,
    ``gate_entropy/<layer>.<projection>``, and ``gate_sum/…`` likewise.

    On a GPU nothing waits for the gates: they are logged, under their own step, once they have arrived.

    Args:
        every_n_steps: Optimizer steps between logs; ``null`` takes the trainer's ``log_every_n_steps``, or a
            multiple of it where a run would log more than 40 MB.
        heatmap: Whether to draw the images.
    """

    def __init__(self, every_n_steps: int | None = None, heatmap: bool = True) -> None:
        self.every_n_steps = every_n_steps
        self.heatmap = heatmap
        self._gated: list[GatedLayer] = []
        self._layers: list[MokaLayer] = []
        self._late: tuple[int, HostCopy] | None = None
        self._total: float = 0
        self._every = 1
        self._last_step = self._drawn = -1
        self._warned: set[str] = set()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the initial gates."""
        self._gated, self._late = gated_layers(pl_module), None
        self._layers = list(_layers(pl_module).values()) if self._gated else []
        every = log_interval(trainer)
        size = sum(_SCALAR_BYTES + len(tag.encode()) for tag in self._board_values())
        total = trainer.estimated_stepping_batches
        self._total = total if math.isfinite(total) else _UNKNOWN_STEPS
        self._every = self.every_n_steps or logged_steps(self._total, size, every)
        self._take(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Takes the gates at the chosen interval, and logs those that have arrived."""
        if trainer.global_step % self._every == 0 and trainer.global_step != self._last_step:
            self._take(trainer)
        if self._late is not None and self._late[1].arrived:
            self._log(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs the gates before the validation's results."""
        self._log(trainer)

    def on_save_checkpoint(self, trainer: Trainer, *of_checkpoint: Any) -> None:
        """Logs the gates that a resumed run begins with."""
        self._log(trainer)

    def on_exception(self, trainer: Trainer, *of_exception: Any) -> None:
        """Logs the last gates, unless the GPU does not answer any more."""
        with suppress(RuntimeError):
            self._log(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draws the heat maps, and warns about uniform or collapsed gates, in training."""
        if not (in_training(trainer) and trainer.is_global_zero):
            return
        if self._gated and (gates := gate_matrix(pl_module)) is not None:
            if trainer.global_step >= self._drawn + self._total / _MOST_PICTURES:
                self._draw(trainer, gates)
            self._warn(trainer, gates)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Logs and draws the final gates."""
        if trainer.global_step != self._last_step:
            self._take(trainer)
        self._log(trainer)
        if trainer.is_global_zero and self._drawn != trainer.global_step and self._gated:
            gates = gate_matrix(pl_module)
            assert gates is not None
            self._draw(trainer, gates)
        self._layers = []

    def _board_values(self) -> dict[str, float]:
        gates = _stacked(self._layers)
        return {} if gates is None else board_scalars(gates.cpu(), self._gated, self._layers[0].gating)

    def _take(self, trainer: Trainer) -> None:
        """Has the gates copied to the host."""
        self._log(trainer)
        self._last_step = trainer.global_step
        if trainer.is_global_zero and trainer.loggers and (gates := _stacked(self._layers)) is not None:
            self._late = trainer.global_step, HostCopy(gates)

    def _log(self, trainer: Trainer) -> None:
        """Logs the gates that were taken, for which it may have to wait."""
        late, self._late = self._late, None
        if late is None:
            return
        step, gates, gating = late[0], late[1].read(), self._layers[0].gating
        for logger in trainer.loggers:
            named = board_scalars if isinstance(logger, TensorBoardLogger) else plain_scalars
            log_scalars(logger, named(gates, self._gated, gating), step)

    def _draw(self, trainer: Trainer, gates: Tensor) -> None:
        self._drawn = trainer.global_step
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if not (boards and self.heatmap):
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        drawn = gate_heatmaps(gates, self._gated)
        values = [Summary.Value(tag=f"{ALPHA}/heat map {name}", image=one) for name, one in drawn.items()]
        for logger in boards:
            write_summary(logger, Summary(value=values), trainer.global_step)

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
            first = self._gated[int(single.int().argmax())].label
            self._warn_once(
                "single",
                f"one component has the whole gate in {int(single.sum())} of {len(single)} layers "
                f"(first {first}), so the others no longer learn. Lower the learning rate or use fewer "
                "components",
            )

    def _warn_once(self, reason: str, message: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warn(message)


def gate_matrix(pl_module: LightningModule) -> Tensor | None:
    """Returns all gates, (layers, r), on the CPU, by a single copy; None without gates that can move."""
    gates = _stacked(_layers(pl_module).values())
    return None if gates is None else gates.cpu()


def _stacked(layers: Collection[MokaLayer]) -> Tensor | None:
    """Returns the layers' gates, (layers, r), on their device; None without gates that can move."""
    logits = [layer.moka_gate for layer in layers if layer.moka_gate is not None]
    if not logits:
        return None
    gating = next(iter(layers)).gating  # all have the same
    if not can_move(gating, len(logits[0])):
        return None
    with torch.no_grad():
        return gates_of(torch.stack(list(logits)).float(), gating)  # (layers, r)


def gated_layers(pl_module: LightningModule) -> list[GatedLayer]:
    """Returns the layers whose gates can move, in the model's order."""
    layers = _layers(pl_module)
    first = next(iter(layers.values()), None)
    if first is None or not can_move(first.gating, first.components):
        return []
    labels = layer_labels(list(layers))
    return [
        GatedLayer(label, name.rpartition(".")[2], layer.shapes)
        for label, (name, layer) in zip(labels, layers.items(), strict=True)
    ]


def logged_steps(total: float, size: int, every: int) -> int:
    """Returns the optimizer steps between two logs: so many that a run's events stay within their bound.

    Args:
        total: Optimizer steps of the run.
        size: Bytes of one log.
        every: Steps between the logs of other values, of which the result is a multiple.
    """
    return every * max(1, math.ceil(total * size / (_MOST_BYTES * every)))


def _layers(pl_module: LightningModule) -> dict[str, MokaLayer]:
    assert isinstance(pl_module, MokaModule)
    return moka_layers(pl_module.causal_lm)
