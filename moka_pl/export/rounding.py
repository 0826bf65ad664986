"""What a model computes once its merged weights are rounded: the reference of an export in half precision.

The difference that rounding makes grows with a model's depth, and a mistake may make a smaller one: no bound
on the whole passes every correct export and refuses the wrong ones. So the adapter itself computes, layer by
layer, what rounding is to make of it:

    y = W x + ΔW x + (round(M) - M) x,    M the merged weight as it is written.

If M is W + ΔW, the export differs from that by float32's own error only. If it is not, the rounding of a
wrong M is still small, and the export differs by what is wrong.
"""

import copy
from collections.abc import Callable, Iterator
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
#: Numbers that are rounded in one go.
_PIECE = 2**22


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
        rounding: Rounds a tensor as the export does, its rows by themselves.
    """
    kept = set(model.state_dict())
    places: dict[int, list[tuple[nn.Module, str]]] = {}  # of each plain tensor; tied ones have several
    adapted: set[int] = set()
    for name, module, layer in list(outer_modules(model)):
        if layer is not None:
            adapted |= {_storage(tensor) for tensor in [*module.parameters(), *module.buffers()]}
            module.register_forward_hook(_AddedError(partial(_merged, layer), rounding))
            continue
        if is_quantised(module):
            module.register_forward_hook(_AddedError(partial(_dense, module), rounding))
        for own, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            written = (f"{name}.{own}" if name else own) in kept and tensor.dtype.is_floating_point
            if written and not (is_quantised(module) and tensor is module.weight):
                places.setdefault(id(tensor), []).append((module, own))
    for tied in places.values():
        tensor = getattr(*tied[0])
        if _storage(tensor) in adapted:  # it is an adapted layer's, too, which rounds what it is merged with
            tensor = _copied(tensor)
            for module, own in tied:
                setattr(module, own, tensor)
        for piece in pieces(tensor.detach()):
            piece.copy_(rounding(piece))


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _copied(tensor: Tensor) -> Tensor:
    copied = tensor.detach().clone()
    return nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied


def pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Views of some rows each: what is made of one after another is never as large as the tensor."""
    if tensor.dim() < 2:
        yield tensor
        return
    yield from torch.split(tensor, max(1, _PIECE * len(tensor) // max(1, tensor.numel())))


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


def _error(tensor: Tensor, rounding: Rounding) -> nn.Parameter:
    """round(M) - M."""
    error = torch.empty_like(tensor)
    for piece, exact in zip(pieces(error), pieces(tensor.detach()), strict=True):
        torch.sub(rounding(exact), exact, out=piece)
    return nn.Parameter(error, requires_grad=False)


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
        added: Tensor = self._errors()(*inputs)
        return output + added.to(output.dtype)

    def _errors(self) -> nn.Module:
        """The dense layer with its errors for weights; the weights are gone."""
        self._making = True
        try:
            dense = self.make()
        finally:
            self._making = False
        errors = {id(parameter): _error(parameter, self.rounding) for parameter in dense.parameters()}
        return copy.deepcopy(dense, errors)
