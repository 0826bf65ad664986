"""What is kept of a training's course: its losses and its gates, small enough for a report."""

import math
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from moka_pl.adapters import moka_layers
from moka_pl.callbacks.gates import gate_matrix
from moka_pl.callbacks.throughput import log_interval
from moka_pl.ops.gating import normalised_entropy


class Series(Callback):
    """Notes the training loss and the gates at every logged step.

    Attributes:
        losses: (step, loss in nats per token), on the training's device until they are asked for.
    """

    def __init__(self) -> None:
        self.losses: list[tuple[int, Tensor]] = []
        self._gates: list[tuple[int, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the gates as they are before the first step."""
        self.losses, self._gates = [], []
        self._note_gates(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Notes loss and gates."""
        step = trainer.global_step
        if step % log_interval(trainer) or (self.losses and self.losses[-1][0] == step):
            return
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            self.losses.append((step, loss.detach().clone()))
        self._note_gates(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the last gates."""
        if self._gates and self._gates[-1][0] != trainer.global_step:
            self._note_gates(trainer, pl_module)

    def loss_values(self) -> list[tuple[int, float]]:
        """The losses as numbers."""
        return [(step, float(loss)) for step, loss in self.losses]

    def gates(self, model: torch.nn.Module) -> dict[str, Any] | None:
        """The gates' course.

        Args:
            model: The trained model, whose layers know the shapes of their components.

        Returns:
            ``steps``; ``entropy``, the mean normalised entropy of all layers at each; ``shapes``, the mean
            gate of every kind of layer and shape of component at each, as shares of the uniform gate 1/r;
            ``final_entropy`` of every layer. None without trained gates.
        """
        if not self._gates:
            return None
        history = torch.stack([gates for _, gates in self._gates])  # (steps, layers, r)
        columns: dict[str, list[Tensor]] = {}
        for place, (name, layer) in enumerate(moka_layers(model).items()):
            for i, label in enumerate(layer.shapes):
                columns.setdefault(f"{name.rpartition('.')[2]} {label}", []).append(history[:, place, i])
        entropy = normalised_entropy(history)  # (steps, layers)
        r = history.shape[2]
        return {
            "steps": [step for step, _ in self._gates],
            "entropy": _rounded(entropy.mean(1)),
            "shapes": {name: _rounded(torch.stack(gates).mean(0) * r) for name, gates in columns.items()},
            "final_entropy": _rounded(entropy[-1]),
        }

    def _note_gates(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gates = gate_matrix(pl_module)
        if gates is not None:
            self._gates.append((trainer.global_step, gates))


def _rounded(values: Tensor) -> list[float | None]:
    """None for what JSON has no number for: gates of a run that has diverged."""
    return [round(value, 5) if math.isfinite(value) else None for value in values.tolist()]
