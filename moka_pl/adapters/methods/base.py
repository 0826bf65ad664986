"""What every kind of adapter must be able to do."""

from typing import Any, Protocol

import torch
from torch import Tensor, nn


class AdapterMethod(Protocol):
    """One way to adapt a model: MoKA, a method of PEFT, or training the base itself.

    Attributes:
        kind: The method's name on disk, ``peft_type`` in ``adapter_config.json``.
        title: Its name for people.
    """

    kind: str
    title: str

    def inject(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Freezes the model and puts trainable tensors of ``dtype`` in; returns the adapted modules' names.

        Raises:
            AdapterError: If this model cannot be adapted in this way.
        """
        ...

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """The trained tensors of an injected model by their names on disk, detached."""
        ...

    def load_state(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Puts tensors back that have the names and shapes of :meth:`state`."""
        ...

    def options(self) -> dict[str, Any]:
        """All options as plain JSON values, enough to build the configuration again."""
        ...

    def facts(self) -> dict[str, Any]:
        """What to tell people of the options."""
        ...
