"""bitsandbytes' 4-bit layers: which they are, and that they compute with the weights they hold."""

import logging
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moka_pl.errors import AdapterError, BackboneError
from moka_pl.utils import silenced

if TYPE_CHECKING:
    from typing import TypeGuard

    from bitsandbytes.nn import Linear4bit


def import_bitsandbytes() -> None:
    """Imports bitsandbytes, ahead of the libraries that would.

    On some CPUs it asks for a package that would fetch a kernel for evaluations from the hub.
    """
    with silenced("bitsandbytes.backends.cpu.ops", below=logging.ERROR):
        import_module("bitsandbytes")


def is_4bit(layer: nn.Module) -> "TypeGuard[Linear4bit]":
    """Whether the layer is a bitsandbytes 4-bit layer (without importing bitsandbytes for others)."""
    return any(kind.__name__ == "Linear4bit" for kind in type(layer).__mro__)


def keep_weights(model: nn.Module) -> None:
    """Keeps all 4-bit layers of a model from changing their weights between training and evaluation.

    On CPUs with bfloat16 instructions bitsandbytes stores a layer anew at its first evaluation, with scales
    rounded to bfloat16: the same layer then computes something else than in training, and what was trained
    beside it fits a little less. Such storage is switched off.

    Args:
        model: A model, or a single layer.

    Raises:
        BackboneError: Where bitsandbytes reads the rows of a layer wrongly on this CPU.
    """
    for name, layer in model.named_modules():
        if not is_4bit(layer):
            continue
        layer.support_avx512bf16_for_cpu = False
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            layer.state_dict()  # undoes that storage
        if state is None or layer.weight.device.type != "cpu" or layer.in_features % state.blocksize == 0:
            continue
        if not _reads_rows(layer.in_features, state.blocksize, state.quant_type):
            raise BackboneError(
                f"{name or 'the layer'}: bitsandbytes misreads 4-bit rows of {layer.in_features} entries on "
                f"this CPU (no multiple of its block of {state.blocksize}); use quantization: none, or a GPU"
            )


@cache
def _reads_rows(entries: int, blocksize: int, quant_type: str) -> bool:
    """Whether rows of this size are dequantised as the same numbers in a single long row."""
    import torch
    from bitsandbytes import functional

    rows = torch.randn(blocksize, entries, generator=torch.Generator().manual_seed(0))
    data, state = functional.quantize_4bit(rows, blocksize=blocksize, quant_type=quant_type)
    found = functional.dequantize_4bit(data, state)
    state.shape = torch.Size([1, rows.numel()])
    return torch.equal(found, functional.dequantize_4bit(data, state).view_as(rows))


# The dense weight of a frozen linear layer, whatever its storage.


def dense_weight(layer: nn.Linear) -> Tensor:
    """Returns the layer's weight as a dense (m, n) matrix; 4-bit weights are dequantised.

    Args:
        layer: An ``nn.Linear`` or a ``bitsandbytes.nn.Linear4bit``.

    Returns:
        The weight itself (no copy) or its dequantised value.

    Raises:
        AdapterError: For a quantised layer of another kind.
    """
    if is_4bit(layer):
        import bitsandbytes as bnb

        state = layer.weight.quant_state
        if state is None:
            raise AdapterError("a 4-bit layer has not been quantised yet; move the model to its device first")
        return bnb.functional.dequantize_4bit(layer.weight.data, state)  # type: ignore[no-any-return]
    if not layer.weight.dtype.is_floating_point:
        raise AdapterError(
            f"a layer of type {type(layer).__name__} stores its weight as {layer.weight.dtype}; "
            "merging knows floating-point and bitsandbytes 4-bit layers"
        )
    return layer.weight.detach()


def merged_linear(layer: nn.Linear, delta: Tensor) -> nn.Linear:
    """Builds the frozen dense layer ``W + ΔW`` with the bias of ``layer``.

    The sum runs in the wider of both dtypes and is then rounded to the weight's own dtype.

    Args:
        layer: The frozen layer.
        delta: ΔW, shape (m, n).

    Returns:
        A new ``nn.Linear``.
    """
    weight = dense_weight(layer)  # (m, n)
    wide = torch.promote_types(weight.dtype, delta.dtype)
    total = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
    with torch.device("meta"):
        merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
    merged.weight = nn.Parameter(total, requires_grad=False)
    if layer.bias is not None:
        merged.bias = nn.Parameter(layer.bias.detach().to(total.dtype, copy=True), requires_grad=False)
    return merged
