"""MoKA as one of the methods."""

from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import describe_filters
from moka_pl.adapters.injection import inject_moka, moka_layers


class MokaMethod:
    """Gated mixtures of Kronecker adapters; see :class:`moka_pl.adapters.methods.base.AdapterMethod`.

    Args:
        config: The adapter's configuration.
    """

    kind = "MOKA"
    title = "MoKA"

    def __init__(self, config: MokaConfig) -> None:
        self.config = config

    def inject(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Wraps the target layers."""
        return inject_moka(model, self.config, dtype)

    @staticmethod
    def state(model: nn.Module) -> dict[str, Tensor]:
        """Factors and gate logits; views of the parameters."""
        return {
            f"{name}.{key}": tensor
            for name, layer in moka_layers(model).items()
            for key, tensor in layer.tensors().items()
        }

    @classmethod
    def load_state(cls, model: nn.Module, state: dict[str, Tensor]) -> None:
        """Copies the tensors, also into merged layers."""
        for name, tensor in cls.state(model).items():
            tensor.copy_(state[name])
        for layer in moka_layers(model).values():
            if layer.merged:  # what was folded in is out of date
                layer.unmerge()
                layer.merge()

    def options(self) -> dict[str, Any]:
        """The configuration's fields."""
        return self.config.to_dict()

    def facts(self) -> dict[str, Any]:
        """Components, filters, gates, scaling and targets."""
        targets = self.config.target_modules
        return {
            "components": self.config.components,
            "filters": describe_filters(self.config.filters),
            "gating": self.config.gating,
            "scaling": self.config.effective_scaling,
            "target modules": targets if isinstance(targets, str) else ", ".join(targets),
        }
