"""Weights and optimizer of a step, kept in the host's memory."""

from copy import deepcopy
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from lightning.fabric.utilities import move_data_to_device
from torch import Tensor
from torch.optim import Optimizer

if TYPE_CHECKING:
    from moka_pl.training.steps import TrainedModule


class Snapshot(NamedTuple):
    """What training changes.

    Attributes:
        step: The number of optimizer steps that it is after.
        weights: Trainable tensors by name.
        optimizer: The optimizer's state of each of its parameters, in their order; empty where it has none.
    """

    step: int
    weights: dict[str, Tensor]
    optimizer: list[dict[str, Any]]

    @classmethod
    def of(cls, step: int, module: "TrainedModule", optimizer: Optimizer) -> Self:
        """Copies weights and state to the host.

        Args:
            step: The number of steps so far.
            module: The module that is trained.
            optimizer: Its optimizer.
        """
        weights = {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}
        kept = [dict(optimizer.state.get(parameter, {})) for parameter in _parameters(optimizer)]
        host = torch.device("cpu")
        return cls(step, *deepcopy((move_data_to_device(weights, host), move_data_to_device(kept, host))))

    @torch.no_grad()
    def restore(self, module: "TrainedModule", optimizer: Optimizer) -> None:
        """Copies weights and state back to where they were: rates and other options stay.

        Args:
            module: The module that is trained.
            optimizer: Its optimizer.
        """
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                parameter.data.copy_(self.weights[name])
        for updated, entry in zip(_parameters(optimizer), self.optimizer, strict=True):
            if not entry:
                optimizer.state.pop(updated, None)
                continue
            current: dict[str, Any] = optimizer.state[updated]
            for name in current.keys() - entry.keys():
                del current[name]
            for name, value in entry.items():
                now = current.get(name)
                if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
                    now.copy_(value)
                else:
                    current[name] = move_data_to_device(deepcopy(value), updated.device)


def _parameters(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
