"""MoKA as one of the methods."""

from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import describe_filters
from moka_pl.adapters.injection import find_targets, moka_layers, replace_module
from moka_pl.adapters.layer import MokaLinear
from moka_pl.adapters.methods.base import AdapterMethod, name_targets
from moka_pl.ops.gating import GATINGS


class MokaMethod(AdapterMethod):
    """Gated mixtures of Kronecker adapters."""

    config_type = MokaConfig
    config: MokaConfig
    kind = "MOKA"
    title = "MoKA"
    tags = ("kronecker",)

    @classmethod
    def layers(cls, model: nn.Module) -> dict[str, MokaLinear]:
        """Returns the layers of MoKA."""
        return moka_layers(model)

    def inject(self, model: nn.Module, dtype: torch.dtype) -> list[str]:
        """Freezes the model and wraps its target layers."""
        names = find_targets(model, self.config)
        wrapped = {}
        for name in names:
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear)
            try:
                wrapped[name] = MokaLinear(layer, self.config, dtype, name)
            except ValueError as error:
                raise type(error)(f"{name}: {error}") from None
        model.requires_grad_(False)  # the new factors and gates are not in it yet
        for name, adapted in wrapped.items():
            replace_module(model, name, adapted)
        return names

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Returns factors and gate logits; views of the parameters."""
        return {
            f"{name}.{key}": tensor
            for name, layer in moka_layers(model).items()
            for key, tensor in layer.tensors().items()
        }

    def options(self) -> dict[str, Any]:
        """Returns the configuration's fields."""
        return self.config.to_dict()

    def facts(self) -> dict[str, Any]:
        """Returns components, filters, gates, scaling and targets."""
        return {
            "components": self.config.components,
            "filters": describe_filters(self.config.filters),
            "gating": self.config.gating,
            "scaling": self.config.effective_scaling,
            "target modules": name_targets(self.config.target_modules),
        }

    def about(self, base: str) -> str:
        """Returns the equation of the adapted layers."""
        return (
            f"A gated mixture of Kronecker adapters for `{base}`: `y = W x + s Σ α_i (A_i ⊗ B_i) x`, "
            f"`{GATINGS[self.config.gating]}`."
        )
