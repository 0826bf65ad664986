"""bitsandbytes' 4-bit linear layers, which quantise, compute and move themselves."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moka_pl.backbone.quantization.kinds import Quantization
from moka_pl.errors import AdapterError
from moka_pl.utils import silenced

if TYPE_CHECKING:
    from typing import TypeGuard

    from bitsandbytes.nn import Linear4bit

    from moka_pl.ops.triton import WeightSource

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


def import_bitsandbytes() -> None:
    """Imports bitsandbytes, ahead of the libraries that would.

    On some CPUs it asks for a package that would fetch a kernel for evaluations from the hub.
    """
    with silenced("bitsandbytes.backends.cpu.ops", below=logging.ERROR):
        import_module("bitsandbytes")


def four_bit_linear(
    layer: nn.Linear, weight: Tensor, quantization: Quantization, double: bool, dtype: torch.dtype
) -> nn.Module:
    """Builds a 4-bit layer with the sizes of ``layer``, and a bias of zeros where that has one.

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


def is_four_bit(layer: nn.Module) -> "TypeGuard[Linear4bit]":
    """Whether the layer is one of bitsandbytes' 4 bits (without importing bitsandbytes for others)."""
    kind: Any = type(layer)
    return _is_four_bit_kind(kind)


def is_four_bit_kind(kind: type) -> bool:
    """As :func:`is_four_bit`, for a class of layers; compilers trace it."""
    return any(base.__name__ == "Linear4bit" for base in kind.__mro__)


_is_four_bit_kind = cache(is_four_bit_kind)


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


#: Whether block scales are kept once they are dequantised.
_KEPT = ContextVar("_KEPT", default=True)


@contextmanager
def without_kept_scales() -> Iterator[None]:
    """Keeps no block scales within the block: where each weight is asked for once, they are memory alone."""
    before = _KEPT.set(False)
    try:
        yield
    finally:
        _KEPT.reset(before)


def forget_scales(layer: nn.Module) -> None:
    """Drops what :func:`dense_weight` keeps of a layer."""
    _PLAINLY_SCALED.pop(layer, None)


def four_bit_weight(layer: "Linear4bit", often: bool) -> Tensor:
    """Returns W, (m, n), dequantised by bitsandbytes.

    Args:
        layer: The layer.
        often: Whether block scales are to be kept, dequantised, on a CPU.

    Raises:
        AdapterError: If the layer is not quantised yet.
    """
    weight = layer.weight
    state = weight.quant_state
    if state is None:
        raise AdapterError("a 4-bit layer is not quantised yet; move the model to its device first")
    if often and state.nested and state.absmax.device.type == "cpu" and _KEPT.get():
        return _dequantise(*_plainly_scaled(layer, weight, state))
    return _dequantise(weight.data.as_subclass(Tensor), state)


def has_uneven_rows(state: Any) -> bool:
    """Whether rows of a matrix end within blocks of one scale, which run on over the next row."""
    return bool(state.shape[-1] % state.blocksize)


def _dequantise(data: Tensor, state: Any) -> Tensor:
    """W, (m, n), of its codes.

    For uneven rows bitsandbytes' AVX-512 kernel takes scales of other blocks (0.50.2, for n a multiple of
    16). The matrix as a single row comes out right: as its generic implementation has it, bit for bit.
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    if not has_uneven_rows(state) or data.device.type != "cpu":
        return dequantize_4bit(data, state)  # type: ignore[no-any-return]
    nested = {"offset": state.offset, "state2": state.state2} if state.nested else {}
    row = torch.Size((1, state.shape.numel()))
    kept = state.code, state.blocksize, state.quant_type, state.dtype
    flat: Tensor = dequantize_4bit(data, QuantState(state.absmax, row, *kept, **nested))
    return flat.view(state.shape)


def four_bit_source(
    weight: Any, data: Tensor, compute: torch.dtype, even: bool, exact: bool = True
) -> "WeightSource | None":
    """Describes a 4-bit weight as the Triton kernels read it, or returns None where they should not.

    Args:
        weight: The weight.
        data: Its numbers, as a plain tensor.
        compute: Dtype of W + ΔW.
        even: Whether the kernels' squares or tiles fill the layer.
        exact: Whether W must come out as the layer itself dequantises it, bit for bit.
    """
    from moka_pl.ops.triton import WeightSource

    state = weight.quant_state
    # W in another half precision would be rounded twice, as its own dequantisation does.
    other = state.dtype not in (compute, torch.float32) or state.quant_type != "nf4"
    if (exact and other) or (not even and data.numel() > _LARGE):
        return None
    if state.blocksize % 16 or vars(state).get("packing_format_for_cpu"):
        return None
    nested = None
    if state.nested:
        if state.state2.blocksize != 256:
            return None
        nested = (state.state2.code, state.state2.absmax, state.offset)
    return WeightSource(data, state.absmax, state.code, state.blocksize, nested)
