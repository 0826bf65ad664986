"""What a model computes once its merged weights are rounded: the reference of an export in half precision.

The difference that rounding makes grows with a model's depth, and a mistake may make a smaller one: no bound
on the whole passes every correct export and refuses the wrong ones. So the adapter itself computes, layer by
layer, what rounding is to make of it:

    y = W x + ΔW x + (round(M) - M) x,    M the merged weight as it is written.

If M is W + ΔW, the export differs from that by float32's own error only. If it is not, the rounding of a
wrong M is still small, and the export differs by what is wrong.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.methods.base import AdaptedLayer
from moka_pl.adapters.methods.registry import outer_modules
from moka_pl.backbone.quantization import dense_weight, is_quantised

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Rounds a tensor, which keeps its dtype.
Rounding = Callable[[Tensor], Tensor]


def rounds_alone(dtype: torch.dtype, *compute: torch.dtype) -> bool:
    """Whether rounding its weights is all that tells an export from its adapter: both compute in float32.

    Args:
        dtype: Of the export's weights.
        *compute: In what the two compute.
    """
    return dtype != torch.float32 and all(one == torch.float32 for one in compute)


def to_dtype(dtype: torch.dtype) -> Rounding:
    """Returns what a dtype makes of numbers."""
    return lambda tensor: tensor.to(dtype).to(tensor.dtype)


def round_weights(model: "PreTrainedModel", rounding: Rounding) -> None:
    """Lets a model compute with its merged weights rounded; there is no way back.

    Args:
        model: A model with adapters of any method, or without, that computes in float32.
        rounding: Rounds a tensor as the export does.
    """
    kept = set(model.state_dict())
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # of each plain tensor; tied ones have several
    for name, module, layer in list(outer_modules(model)):
        if layer is not None:
            module.register_forward_hook(_AddedError(partial(_merged, layer), rounding))
            continue
        if is_quantised(module):
            module.register_forward_hook(_AddedError(partial(_dense, module), rounding))
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            written = (f"{name}.{own}" if name else own) in kept and tensor.dtype.is_floating_point
            if written and not (is_quantised(module) and tensor is module.weight):
                places.setdefault(id(tensor), []).append((module, own))
    for tied in places.values():
        # In a tensor of its own: the old one may be an adapted layer's, too.
        rounded = _rounded(getattr(*tied[0]), rounding)
        for module, own in tied:
            setattr(module, own, rounded)


def _rounded(tensor: Tensor, rounding: Rounding) -> Tensor:
    rounded = rounding(tensor.detach())
    return nn.Parameter(rounded, requires_grad=False) if isinstance(tensor, nn.Parameter) else rounded


def _dense(module: Any) -> nn.Linear:
    dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    dense.weight = nn.Parameter(dense_weight(module), requires_grad=False)
    return dense


def _merged(layer: AdaptedLayer) -> nn.Module:
    was = layer.merged_layer is not None
    layer.merge()
    merged = layer.merged_layer
    assert merged is not None
    if not was:
        layer.unmerge()
    return merged


class _AddedError:
    """A forward hook that adds what a layer makes of its input with the errors of rounding for weights.

    Args:
        make: Makes the dense layer, which is linear in its weights as all layers with weights are.
        rounding: How its weights are rounded.
    """

    def __init__(self, make: Callable[[], nn.Module], rounding: Rounding) -> None:
        self.make, self.rounding = make, rounding
        self._making = False

    def __call__(self, module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> Tensor | None:
        if self._making:  # some layers are merged by asking what they compute
            return None
        self._making = True
        try:
            dense = self.make()
        finally:
            self._making = False
        errors = {
            id(parameter): nn.Parameter(_rounded(parameter, self.rounding) - parameter, requires_grad=False)
            for parameter in dense.parameters()
        }
        added: Tensor = copy.deepcopy(dense, errors)(*inputs)
        return output + added.to(output.dtype)
