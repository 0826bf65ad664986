"""The one place that knows a quantiser: bitsandbytes' 4-bit linear layers.

Everything else asks the functions here, so that another quantiser is supported by teaching it to them.
"""

import logging
from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.errors import AdapterError, BackboneError
from moka_pl.utils import silenced

if TYPE_CHECKING:
    from typing import TypeGuard

    from bitsandbytes.nn import Linear4bit

    from moka_pl.ops.triton import WeightSource

Quantization = Literal["nf4", "fp4", "none"]

_BELOW = (-1.0, -0.696192801, -0.5250730515, -0.3949174881, -0.2844413817, -0.1847734302, -0.0910500363)
_ABOVE = (
    0.0,
    0.0795802996,
    0.1609302014,
    0.2461123019,
    0.3379152417,
    0.4407098293,
    0.5626170039,
    0.7229568362,
    1.0,
)
#: The levels of NF4, relative to the largest entry of a block.
NF4_LEVELS = _BELOW + _ABOVE

#: Bytes of a 4-bit weight from which on bitsandbytes' own kernel reads uneven layers faster, launch included.
_LARGE = 2**20


def import_quantiser() -> None:
    """Imports bitsandbytes, ahead of the libraries that would.

    On some CPUs it asks for a package that would fetch a kernel for evaluations from the hub.
    """
    with silenced("bitsandbytes.backends.cpu.ops", below=logging.ERROR):
        import_module("bitsandbytes")


def loading_options(quantization: Quantization, double: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the options that make transformers quantise a model while it is loaded.

    Args:
        quantization: How linear weights are stored.
        double: Whether the block scales are quantised, too.
        dtype: Compute dtype.
    """
    if quantization == "none":
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}


class QuantisedError(BackboneError):
    """A checkpoint is quantised already in another way than was asked for.

    Attributes:
        stored: How it is.
    """

    def __init__(self, name: str, stored: Quantization, asked: Quantization) -> None:
        self.stored = stored
        super().__init__(
            f"{name} is quantised already, as {stored}, and cannot be loaded with quantization {asked}; set "
            f"--model.backbone.quantization {stored}, or give its unquantised original"
        )


def stored_quantization(stored: Mapping[str, Any], name: str) -> tuple[Quantization, bool]:
    """Returns how a checkpoint is quantised already, and whether its block scales are, too.

    Args:
        stored: The ``quantization_config`` of its ``config.json``.
        name: The model's name, for messages.

    Raises:
        BackboneError: For another format than bitsandbytes' 4 bits.
    """
    kind = stored.get("bnb_4bit_quant_type", "fp4")
    if stored.get("load_in_4bit") is True and kind in get_args(Quantization):
        return kind, bool(stored.get("bnb_4bit_use_double_quant", False))
    method = stored.get("quant_method", "an unnamed method")
    bits = " in 8 bits" if stored.get("load_in_8bit") is True else ""
    raise BackboneError(
        f"{name} is quantised already, by {method}{bits}, and cannot be trained on; give its unquantised "
        "original, or one in bitsandbytes' nf4 or fp4"
    )


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
    from bitsandbytes.nn import Linear4bit, Params4bit

    bias = layer.bias is not None
    with torch.device("meta"):
        quantised = Linear4bit(layer.in_features, layer.out_features, bias=bias, compute_dtype=dtype)
    quantised.weight = Params4bit(
        weight, requires_grad=False, quant_type=quantization, compress_statistics=double, module=quantised
    ).to(weight.device)
    if bias:
        quantised.bias = nn.Parameter(torch.zeros_like(layer.bias, device=weight.device), requires_grad=False)
    return quantised  # type: ignore[no-any-return]


def is_quantised(layer: nn.Module) -> "TypeGuard[Linear4bit]":
    """Whether the layer is quantised (without importing bitsandbytes for others).

    Such a layer takes inputs of any dtype and returns that dtype.
    """
    kind: Any = type(layer)
    return _is_quantised_kind(kind)


def is_quantised_kind(kind: type) -> bool:
    """As :func:`is_quantised`, for a class of layers; compilers trace it."""
    return any(base.__name__ == "Linear4bit" for base in kind.__mro__)


_is_quantised_kind = cache(is_quantised_kind)


def keep_weights(model: nn.Module) -> None:
    """Keeps the 4-bit layers of a model, or a single one, from changing between training and evaluation.

    On CPUs with bfloat16 instructions bitsandbytes stores a layer anew at its first evaluation, with scales
    rounded to bfloat16: the same layer then computes something else than in training, and what was trained
    beside it fits a little less. Such storage is switched off.

    Raises:
        BackboneError: Where bitsandbytes reads the rows of a layer wrongly on this CPU.
    """
    for name, layer in model.named_modules():
        if not is_quantised(layer):
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
                f"this CPU (not a multiple of the block size {state.blocksize}); set quantization: none, or "
                "use a GPU"
            )


@cache
def _reads_rows(entries: int, blocksize: int, quant_type: str) -> bool:
    """Whether rows of this size are dequantised as the same numbers in a single long row."""
    from bitsandbytes import functional

    rows = torch.randn(blocksize, entries, generator=torch.Generator().manual_seed(0))
    data, state = functional.quantize_4bit(rows, blocksize=blocksize, quant_type=quant_type)
    by_rows = functional.dequantize_4bit(data, state)
    state.shape = torch.Size([1, rows.numel()])
    return torch.equal(by_rows, functional.dequantize_4bit(data, state).view_as(rows))


def layer_compute_dtype(layer: "Linear4bit", x: Tensor | None = None) -> torch.dtype:
    """Returns the dtype in which a quantised layer computes.

    A layer without one takes it from the input ``x``, as its own first call does.
    """
    if x is not None and not layer.compute_type_is_set:
        layer.set_compute_type(x)
        layer.compute_type_is_set = True
    return layer.compute_dtype or (torch.float32 if x is None else x.dtype)


def dense_weight(layer: nn.Linear, often: bool = False) -> Tensor:
    """Returns the layer's weight as a dense (m, n) matrix: itself, not a copy, or the dequantised 4-bit one.

    Args:
        layer: The layer.
        often: Whether a 4-bit weight is asked for in every step. On a CPU its block scales are then
            dequantised only once and kept, which takes an eighth of the weight's own memory.

    Raises:
        AdapterError: For a quantised layer of another kind.
    """
    if is_quantised(layer):
        import bitsandbytes as bnb

        weight = layer.weight
        state = weight.quant_state
        if state is None:
            raise AdapterError("a 4-bit layer is not quantised yet; move the model to its device first")
        if often and state.nested and state.absmax.device.type == "cpu":
            return bnb.functional.dequantize_4bit(*_plainly_scaled(layer, weight, state))  # type: ignore[no-any-return]
        return bnb.functional.dequantize_4bit(weight.data, state)  # type: ignore[no-any-return]
    if not layer.weight.dtype.is_floating_point:
        raise AdapterError(
            f"cannot merge into a {type(layer).__name__} with {layer.weight.dtype} weights; only "
            "floating-point and bitsandbytes 4-bit layers can be merged"
        )
    return layer.weight.detach()


class _PlainlyScaled(NamedTuple):
    """A 4-bit weight whose block scales are not quantised, and the quantised ones that these were.

    It does not hold the weight's own tensor, which holds its layer.
    """

    scales: Tensor
    data: Tensor
    state: Any


_PLAINLY_SCALED: WeakKeyDictionary[nn.Module, _PlainlyScaled] = WeakKeyDictionary()


def _plainly_scaled(layer: nn.Module, weight: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Data and ``QuantState`` of a weight without the second quantisation: the same numbers, bit for bit.

    It also avoids attributes of the weight, each of which takes bitsandbytes' subclass some microseconds.
    """
    known = _PLAINLY_SCALED.get(layer)
    if known is None or known.scales is not state.absmax:
        from bitsandbytes.functional import QuantState, dequantize_blockwise

        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
        kept = state.shape, state.code, state.blocksize, state.quant_type, state.dtype
        plain = QuantState(scales.float(), *kept)
        known = _PlainlyScaled(state.absmax, weight.data.as_subclass(Tensor), plain)
        if type(plain.absmax) is Tensor:  # no stand-in for a tensor, which a trace puts here
            _PLAINLY_SCALED[layer] = known
    return known.data, known.state


def forget_scales(layer: nn.Module) -> None:
    """Drops what :func:`dense_weight` keeps of a layer."""
    _PLAINLY_SCALED.pop(layer, None)


def storage_device(layer: nn.Linear, quantised: bool) -> torch.device:
    """Returns where the layer's weight lies."""
    weight: Any = layer.weight
    state = weight.quant_state if quantised else None
    device: torch.device = (weight if state is None else state.absmax).device
    return device


def frozen_output(layer: nn.Linear, autocast: bool, x: Tensor) -> Tensor:
    """Returns ``W x + bias``, (..., m), bit for bit as the layer computes it, in the dtype of x.

    Args:
        layer: An ``nn.Linear`` or a ``bitsandbytes.nn.Linear4bit``.
        autocast: Whether the layer is called under autocast, which a 4-bit layer's product heeds, too.
        x: Its input in the dtype of the product, shape (..., n).
    """
    # On a CPU bitsandbytes' own call does the same, but takes a quarter of a small layer's time for it.
    if is_quantised(layer) and (autocast or x.device.type != "cpu"):
        with torch.autocast(x.device.type, enabled=autocast):
            return layer(x).to(x.dtype)  # type: ignore[no-any-return]
    bias = None if layer.bias is None else layer.bias.to(x.dtype)
    return F.linear(x, dense_weight(layer, often=True).to(x.dtype), bias)


def kernel_weight(layer: nn.Linear, compute: torch.dtype, even: bool) -> "WeightSource | None":
    """Describes the layer's weight as the Triton kernels read it, or returns None where they should not.

    Args:
        layer: An ``nn.Linear`` or a ``bitsandbytes.nn.Linear4bit``.
        compute: Dtype of W + ΔW.
        even: Whether the kernels' squares or tiles fill the layer.
    """
    from moka_pl.ops.triton import WeightSource

    weight: Any = layer.weight  # asked for once: each time takes microseconds
    # Everything that is asked of bitsandbytes' subclass takes microseconds, too.
    data, state = weight.as_subclass(Tensor), weight.quant_state if is_quantised(layer) else None
    if state is None:
        return WeightSource(data)
    # W in another half precision would be rounded twice, as its own dequantisation does.
    if state.dtype not in (compute, torch.float32) or (not even and data.numel() > _LARGE):
        return None
    if state.quant_type != "nf4" or state.blocksize % 16 or vars(state).get("packing_format_for_cpu"):
        return None
    nested = None
    if state.nested:
        if state.state2.blocksize != 256:
            return None
        nested = (state.state2.code, state.state2.absmax, state.offset)
    return WeightSource(data, state.absmax, state.code, state.blocksize, nested)


def weight_count(parameter: Tensor) -> int:
    """Returns the number of weights of a parameter; 4-bit ones, which lie two to a byte, count singly."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else int(state.shape.numel())


def relative_entries(parameter: Tensor, index: Tensor) -> Tensor:
    """Returns some weights of a parameter, float32, 4-bit ones relative to the largest of their block.

    Args:
        parameter: A weight of any storage.
        index: Flat indices of weights, of any shape.
    """
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.detach().flatten()[index].float()
    byte = parameter.detach().flatten().view(torch.uint8)[index // 2]
    code = torch.where(index % 2 == 0, byte >> 4, byte & 15)
    return state.code.to(code.device)[code.long()].float()  # type: ignore[no-any-return]


def storage_of(parameter: Tensor) -> str:
    """Returns how a parameter is stored, such as ``nf4-bfloat16`` (made of bfloat16) or ``none-float32``."""
    state = getattr(parameter, "quant_state", None)
    kind, dtype = ("none", parameter.dtype) if state is None else (state.quant_type, state.dtype)
    return f"{kind}-{str(dtype).removeprefix('torch.')}"


def quantization_of(model: nn.Module) -> tuple[Quantization, bool]:
    """Returns how a model's linear layers are stored, and whether the block scales are quantised, too."""
    for layer in model.modules():
        if is_quantised(layer) and (state := layer.weight.quant_state) is not None:
            return state.quant_type, bool(state.nested)
    return "none", True


def merged_linear(layer: nn.Linear, delta: Tensor) -> nn.Linear:
    """Builds the frozen dense layer ``W + ΔW``, ΔW of shape (m, n), with the bias of ``layer``.

    The sum runs in the wider of both dtypes and is then rounded to the weight's own dtype.
    """
    weight = dense_weight(layer)  # (m, n)
    wide = torch.promote_types(weight.dtype, delta.dtype)
    total = (weight.to(wide) + delta.to(wide)).to(weight.dtype)
    merged = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    merged.weight = nn.Parameter(total, requires_grad=False)
    if layer.bias is not None:
        merged.bias = nn.Parameter(layer.bias.detach().to(total.dtype, copy=True), requires_grad=False)
    return merged
