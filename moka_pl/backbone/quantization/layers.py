"""What the package asks of a linear layer's frozen weight, however that is stored."""

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.backbone.quantization.four_bit import (
    four_bit_linear,
    four_bit_source,
    four_bit_weight,
    is_four_bit,
    is_four_bit_kind,
)
from moka_pl.backbone.quantization.kinds import Quantization
from moka_pl.backbone.quantization.registry import MAKERS, check_layer
from moka_pl.backbone.quantization.stored import QuantisedLinear
from moka_pl.errors import AdapterError

if TYPE_CHECKING:
    from typing import TypeGuard

    from moka_pl.ops.triton import WeightSource


def quantised_linear(
    layer: nn.Linear, weight: Tensor, quantization: Quantization, double: bool, dtype: torch.dtype
) -> nn.Module:
    """Builds a quantised layer with the sizes of ``layer``, and a bias of zeros where that has one.

    Args:
        layer: The layer whose place it is to take, perhaps without a weight.
        weight: W, shape (m, n), on the device of the new layer.
        quantization: How the weight is stored.
        double: Whether the block scales are quantised, too.
        dtype: Compute dtype.
    """
    if quantization in ("nf4", "fp4"):
        return four_bit_linear(layer, weight, quantization, double, dtype)
    check_layer(layer, quantization)
    bias = None
    if layer.bias is not None:
        bias = nn.Parameter(torch.zeros_like(layer.bias, device=weight.device), requires_grad=False)
    return QuantisedLinear(*MAKERS[quantization].quantise(weight), bias, dtype)


def is_quantised(layer: nn.Module) -> "TypeGuard[Any]":
    """Whether the layer is quantised.

    Such a layer takes inputs of any dtype and returns that dtype.
    """
    kind: Any = type(layer)
    return _is_quantised_kind(kind)


def is_quantised_kind(kind: type) -> bool:
    """As :func:`is_quantised`, for a class of layers; compilers trace it."""
    return is_four_bit_kind(kind) or issubclass(kind, QuantisedLinear)


_is_quantised_kind = cache(is_quantised_kind)


def layer_compute_dtype(layer: Any, x: Tensor | None = None) -> torch.dtype:
    """Returns the dtype in which a quantised layer computes.

    A layer without one takes it from the input ``x``, as its own first call does.
    """
    if isinstance(layer, QuantisedLinear):
        return layer.compute_dtype
    if x is not None and not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return layer.compute_dtype or (torch.float32 if x is None else x.dtype)


def dense_weight(layer: nn.Linear, often: bool = False) -> Tensor:
    """Returns the layer's weight as a dense (m, n) matrix: itself, not a copy, or the dequantised one.

    Args:
        layer: The layer.
        often: Whether the weight is asked for in every step. On a CPU the block scales of one of 4 bits are
            then dequantised only once and kept, which takes an eighth of the weight's own memory.

    Raises:
        AdapterError: For a layer that another library has quantised.
    """
    if isinstance(layer, QuantisedLinear):
        return layer.dequantise()
    if is_four_bit(layer):
        return four_bit_weight(layer, often)
    check_dense(layer)
    return layer.weight.detach()


def check_dense(layer: nn.Module) -> None:
    """Refuses a layer of which :func:`dense_weight` cannot be had.

    Raises:
        AdapterError: For a layer that another library has quantised.
    """
    known = isinstance(layer, QuantisedLinear) or is_four_bit(layer)
    weight = getattr(layer, "weight", None)
    if not known and isinstance(weight, Tensor) and not weight.dtype.is_floating_point:
        raise AdapterError(
            f"cannot merge into a {type(layer).__name__} with {weight.dtype} weights; save the adapter "
            "and run python -m moka_pl export ADAPTER --to merged, or load the model unquantised, or by "
            "moka_pl with quantization nf4 or int8"
        )


def storage_device(layer: nn.Linear, quantised: bool) -> torch.device:
    """Returns where the layer's weight lies."""
    weight: Any = layer.weight
    state = weight.quant_state if quantised and not isinstance(layer, QuantisedLinear) else None
    device: torch.device = (weight if state is None else state.absmax).device
    return device


def weight_scales(layer: nn.Module) -> tuple[str, ...]:
    """Returns the names of the tensors that hold the scales of a layer's quantised weight."""
    if isinstance(layer, QuantisedLinear):
        return tuple(layer.stored.scales)
    return ("absmax",) if is_four_bit(layer) else ()


def frozen_output(layer: nn.Linear, autocast: bool, x: Tensor) -> Tensor:
    """Returns ``W x + bias``, (..., m), bit for bit as the layer computes it, in the dtype of x.

    Args:
        layer: An ``nn.Linear`` or a quantised layer.
        autocast: Whether the layer is called under autocast, which a quantised layer's product heeds, too.
        x: Its input in the dtype of the product, shape (..., n).
    """
    # On a CPU bitsandbytes' own call does the same, but takes a quarter of a small layer's time for it.
    if is_quantised(layer) and (autocast or x.device.type != "cpu"):
        with torch.autocast(x.device.type, enabled=autocast):
            return layer(x).to(x.dtype)  # type: ignore[no-any-return]
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, dense_weight(layer, often=True).to(x.dtype), bias)


def kernel_weight(
    layer: nn.Linear, compute: torch.dtype, even: bool, exact: bool = True
) -> "WeightSource | None":
    """Describes the layer's weight as the Triton kernels read it, or returns None where they should not.

    Args:
        layer: An ``nn.Linear`` or a quantised layer.
        compute: Dtype of W + ΔW.
        even: Whether the kernels' squares or tiles fill the layer.
        exact: Whether W must come out as the layer itself dequantises it, bit for bit.
    """
    from moka_pl.ops.triton import WeightSource

    if isinstance(layer, QuantisedLinear):
        return None
    weight: Any = layer.weight  # asked for once: each time takes microseconds
    # Everything that is asked of bitsandbytes' subclass takes microseconds, too.
    data = weight.as_subclass(Tensor)
    if not is_four_bit(layer) or weight.quant_state is None:
        return WeightSource(data)
    return four_bit_source(weight, data, compute, even, exact)


def is_stored_quantised(parameter: Tensor) -> bool:
    """Whether a parameter holds the codes of a quantised weight."""
    return hasattr(parameter, "stored") or getattr(parameter, "quant_state", None) is not None


def weight_count(parameter: Tensor) -> int:
    """Returns the number of weights of a parameter; quantised ones count singly, however they are packed."""
    state = getattr(parameter, "quant_state", None) or getattr(parameter, "stored", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def base_bytes(model: nn.Module) -> int:
    """Returns the bytes of all frozen parameters of a model, with the scales of those that are quantised."""
    total = 0
    for parameter in model.parameters():  # and not layers: PEFT's have the weight of the layer inside, too
        if parameter.requires_grad:
            continue
        total += parameter.nbytes
        if (stored := getattr(parameter, "stored", None)) is not None:
            total += sum(scales.nbytes for scales in stored.scales.values())
        elif (state := getattr(parameter, "quant_state", None)) is not None:
            total += state.absmax.nbytes + (state.state2.absmax.nbytes if state.nested else 0)
    return total


def relative_entries(parameter: Tensor, index: Tensor) -> Tensor:
    """Returns some weights of a parameter, float32, 4-bit ones relative to the largest of their block.

    Args:
        parameter: A weight of any storage.
        index: Flat indices of weights, of any shape.
    """
    if (stored := getattr(parameter, "stored", None)) is not None:
        return stored.read(parameter.data).flatten()[index].float()  # type: ignore[no-any-return]
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach().flatten()[index].float()
    byte = parameter.detach().flatten().view(torch.uint8)[index // 2]
    code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    return state.code.to(code.device)[code.long()].float()  # type: ignore[no-any-return]


def storage_of(parameter: Tensor) -> str:
    """Returns how a parameter is stored, such as ``nf4-bfloat16`` (made of bfloat16) or ``none-float32``."""
    state, stored = getattr(parameter, "quant_state", None), getattr(parameter, "stored", None)
    kind, dtype = "none", parameter.dtype
    if stored is not None:
        kind, dtype = stored.label, stored.dtype
    elif state is not None:
        kind, dtype = state.quant_type, state.dtype
    return f"{kind}-{str(dtype).removeprefix('torch.')}"


def quantization_of(model: nn.Module) -> tuple[Quantization, bool]:
    """Returns how a model's linear layers are stored, and whether the block scales are quantised, too."""
    for layer in model.modules():
        if isinstance(layer, QuantisedLinear):
            return layer.stored.kind, True
        if is_four_bit(layer) and (state := layer.weight.quant_state) is not None:
            return state.quant_type, bool(state.nested)
    return "none", True


def merged_weight(weight: Tensor, delta: Tensor) -> nn.Parameter:
    """Returns the frozen ``W + ΔW``, summed in the wider of both dtypes and rounded to W's own."""
    wide = torch.promote_types(weight.dtype, delta.dtype)
    return nn.Parameter((weight.to(wide) + delta.to(wide)).to(weight.dtype), requires_grad=False)


def merged_linear(layer: nn.Linear, delta: Tensor) -> nn.Linear:
    """Builds the frozen dense layer :func:`merged_weight`, ΔW of shape (m, n), with the bias of ``layer``."""
    total = merged_weight(dense_weight(layer), delta)
    merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    merged.weight = total
    if layer.bias is not None:
        merged.bias = nn.Parameter(layer.bias.detach().to(total.dtype, copy=True), requires_grad=False)
    return merged
