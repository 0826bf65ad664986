"""Linear layers that are trained as a whole beside the adapters, such as the head of a classifier."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from moka_pl.adapters.layer import WrappedLayer
from moka_pl.adapters.patterns import matching
from moka_pl.adapters.schema import shown
from moka_pl.backbone.quantization import is_quantised
from moka_pl.errors import AdapterError

#: Stands in the names of their tensors, ``classifier.trained.weight``.
TRAINED = "trained"


class TrainedLinear(WrappedLayer):
    """A frozen linear layer and a copy of it that is trained in its place.

    Args:
        base_layer: The frozen layer.
        dtype: Dtype of the copy.
    """

    base_layer: nn.Linear
    merged_layer: nn.Linear | None

    def __init__(self, base_layer: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__(base_layer)
        self.trained = _copy(base_layer, dtype).requires_grad_(True)

    def forward(self, x: Tensor) -> Tensor:
        """Computes ``W' x + b'`` with the trained copy, (…, n) to (…, m)."""
        if not self.enabled:
            out: Tensor = self.base_layer(x)
            return out
        layer = self.trained if self.merged_layer is None else self.merged_layer
        return layer(x.to(layer.weight.dtype)).to(x.dtype)  # type: ignore[no-any-return]  # (…, m)

    def merge(self) -> None:
        """Makes the copy a plain layer of the base's dtype, frozen."""
        if self.merged_layer is None:
            self.merged_layer = _copy(self.trained, self.base_layer.weight.dtype).requires_grad_(False)

    def tensors(self) -> dict[str, Tensor]:
        """Returns the copy's tensors by name, detached."""
        return {f"{TRAINED}.{name}": p.detach() for name, p in self.trained.named_parameters()}


def trained_layers(model: nn.Module) -> dict[str, TrainedLinear]:
    """Returns the layers that are trained as a whole by name, in model order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedLinear)}


def find_trained(model: nn.Module, patterns: list[str] | None) -> list[str]:
    """Returns the full names of the layers that ``modules_to_save`` means, in model order.

    ``patterns`` are their names or endings of these; the model has no adapters yet.

    Raises:
        AdapterError: If nothing matches, or a match is no dense linear layer of its own.
    """
    modules = dict(model.named_modules())
    reads = getattr(model, "main_input_name", "") == "input_ids"
    heads = [getattr(model, f"get_{kind}put_embeddings")() for kind in ("in", "out")] if reads else []
    names = matching(filter(None, modules), patterns)
    for pattern in patterns or ():
        if not matching(names, [pattern]):
            raise AdapterError(f"modules_to_save {shown(pattern)} matches no module of this model")
    for name in names:
        module = modules[name]
        if not isinstance(module, nn.Linear) or is_quantised(module):
            kind = "quantised" if isinstance(module, nn.Linear) else f"a {type(module).__name__}"
            raise AdapterError(f"modules_to_save: {name} is {kind}; name dense linear layers")
        if module in heads:
            raise AdapterError(
                f"modules_to_save: {name} reads or writes tokens, whose loss is computed without calling it; "
                "leave it out"
            )
    return names


def trained_sizes(model: nn.Module, names: Collection[str]) -> dict[str, Tensor]:
    """Returns what :meth:`TrainedLinear.tensors` of some layers will be, by full name, without contents."""
    return {
        f"{name}.{TRAINED}.{key}": torch.empty_like(parameter, device="meta")
        for name in names
        for key, parameter in model.get_submodule(name).named_parameters()
    }


def _copy(layer: nn.Linear, dtype: torch.dtype) -> nn.Linear:
    weight, bias = layer.weight, layer.bias
    copy = nn.Linear(layer.in_features, layer.out_features, bias is not None, device="meta")
    copy.weight = nn.Parameter(weight.detach().to(dtype, copy=True))
    if bias is not None:
        copy.bias = nn.Parameter(bias.detach().to(dtype, copy=True))
    return copy.train(layer.training)
