"""Products of activations with a frozen weight, both in 8-bit floats (see ``operands.py``)."""

import weakref
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.functional import ScalingType

from moka_pl._compat import change_count, viewed
from moka_pl.ops.triton.float8.operands import FLOAT8, Scaled, scale_rows

#: What both sizes of a weight must be divisible by.
DIVISOR = 16

#: The oldest GPUs that multiply 8-bit floats.
_OLDEST = (8, 9)


def multiply(x: Scaled, weight: Scaled, dtype: torch.dtype, bias: Tensor | None = None) -> Tensor:
    """Returns ``x Wᵀ + bias``, (T, m), whose product is summed in float32.

    Args:
        x: (T, n) by rows.
        weight: (m, n) by rows; 16 divides m and n.
        dtype: Dtype of the result.
        bias: (m,), in that dtype.
    """
    product: Tensor = F.scaled_mm(
        x.numbers,
        weight.numbers.t(),
        x.scales,
        ScalingType.RowWise,
        weight.scales.view(1, -1),
        ScalingType.RowWise,
        output_dtype=dtype,
        use_fast_accum=True,
    )
    # cuBLAS has no product of a few rows that adds a bias: not of 7 with 11,008 columns.
    return product if bias is None else product.add_(bias)


def unsupported_reason(device: torch.device) -> str | None:
    """Returns what a device lacks for these products, or None; tries one on it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "an NVIDIA GPU of compute capability 8.9 or newer"
    capability = torch.cuda.get_device_capability(device)
    if capability < _OLDEST:
        name = torch.cuda.get_device_name(device)
        return f"compute capability 8.9 or newer ({name} has {capability[0]}.{capability[1]})"
    numbers = torch.ones(DIVISOR, DIVISOR, device=device).to(FLOAT8)
    ones = Scaled(numbers, torch.ones(DIVISOR, 1, device=device))
    try:
        multiply(ones, ones, torch.bfloat16)
    except (RuntimeError, ValueError) as error:
        return f"a PyTorch that has them for this GPU: {torch.__version__} says {str(error).splitlines()[0]}"
    return None


class _Last(NamedTuple):
    """The activations that were scaled last, to be used again by the next layers that read them.

    Attributes:
        owner: The tensor that owns their memory; while it lives, no other tensor can lie there.
        key: What of it was scaled, and when.
        scaled: The result.
    """

    owner: "weakref.ref[Tensor]"
    key: tuple[object, ...]
    scaled: Scaled


_last: list[_Last] = []


def _forget(owner: "weakref.ref[Tensor]") -> None:
    if _last and _last[0].owner is owner:
        _last.clear()


def scale_input(x: Tensor) -> Scaled:
    """As :func:`scale_rows` for an input, (T, n), of layers, several of which may read the same.

    Only what a differentiable operation has made is remembered, which a step makes anew. A recorded step must
    not use what was made before it: it would not be made again when the step is replayed.

    Args:
        x: A contiguous matrix, perhaps a view.
    """
    owner = viewed(x)
    if owner.is_leaf or owner.is_inference():
        return scale_rows(x)
    recording = x.is_cuda and torch.cuda.is_current_stream_capturing()
    key = (x.data_ptr(), x.shape, change_count(owner), recording)
    if _last and _last[0].owner() is owner and _last[0].key == key:
        return _last[0].scaled
    scaled = scale_rows(x)
    _last[:] = [_Last(weakref.ref(owner, _forget), key, scaled)]
    return scaled
