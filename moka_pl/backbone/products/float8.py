"""Products of frozen 4-bit layers in 8-bit floats while a model trains.

Both products with a frozen W run in E4M3, on GPUs that multiply it at twice the speed of bfloat16: ``x Wᵀ``
in the forward pass and ``G W`` in the backward pass. Rows of x and G have scales of their own, W has one for
each row or, for ``G W``, for each column. These are found once, when the model is loaded. All else stays as
it was: adapters and their gradients, attention, norms, loss, and evaluation and generation as a whole.
"""

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from moka_pl.backbone.quantization import dense_weight, is_four_bit, kernel_weight
from moka_pl.errors import ConfigError
from moka_pl.ops.shared_input import Held, call_sharing, new_link

if TYPE_CHECKING:
    from moka_pl.ops.triton import WeightSource
    from moka_pl.ops.triton.float8 import Scaled

Matmul = Literal["bf16", "fp8"]

#: Where a layer keeps the scales of its weight.
_SCALES = "float8_scales"


def check_float8(device: torch.device, dtype: torch.dtype, quantization: str) -> None:
    """Refuses to train with 8-bit products where nothing can compute them.

    Args:
        device: Where the model is to train.
        dtype: Its compute dtype.
        quantization: How its weights are stored.

    Raises:
        ConfigError: Naming what is missing.
    """
    if quantization not in ("nf4", "fp4"):
        missing = f"backbone.quantization nf4 or fp4, not {quantization}"
    else:
        missing = missing_for_float8(device) or ""
    if not missing and dtype is not torch.bfloat16:
        missing = f"compute dtype bfloat16, not {str(dtype).removeprefix('torch.')}"
    if missing:
        raise ConfigError(f"backbone.matmul is fp8, which needs {missing}; set --model.backbone.matmul bf16")


@torch.no_grad()
def keep_scales(module: nn.Module) -> None:
    """Finds the scales of all 4-bit layers of a module that can compute so, once."""
    if find_spec("triton") is None:
        return
    from moka_pl.ops.triton.float8 import WeightScales

    for layer in module.modules():
        if is_four_bit(layer) and not hasattr(layer, _SCALES) and _source(layer) is not None:
            setattr(layer, _SCALES, WeightScales.of(dense_weight(layer)))


def describe_float8(model: nn.Module) -> str:
    """Returns a sentence on how many layers compute in 8 bits while they train."""
    layers = [module for module in model.modules() if is_four_bit(module)]
    count = sum(hasattr(layer, _SCALES) for layer in layers)
    return f"8-bit products in training: {count} of {len(layers)} frozen 4-bit layers"


def missing_for_float8(device: torch.device) -> str | None:
    """Returns what a machine lacks for 8-bit products, or None."""
    if find_spec("triton") is None:
        return "Triton"
    from moka_pl.ops.triton.float8 import unsupported_reason

    return unsupported_reason(device)


def multiplies_in_float8(layer: Any, dtype: torch.dtype) -> bool:
    """Whether a layer's products with inputs of a dtype are in 8 bits now.

    Args:
        layer: A frozen linear layer.
        dtype: Dtype of its input.
    """
    return layer.training and dtype is torch.bfloat16 and hasattr(layer, _SCALES)


def float8_product(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Computes ``W x + bias``, (..., m), for a layer that :func:`multiplies_in_float8`.

    Args:
        layer: The layer.
        x: Its input, (..., n).
        bias: Its bias, which is not trained, in the dtype of x, or None.
    """
    product = call_sharing(Float8Product, x, bias, layer)
    return product.view(*x.shape[:-1], product.shape[1])


def input_gradient(layer: Any, grad: Tensor) -> Tensor | None:
    """Computes ``G W``, (T, n), in 8 bits; None for a layer that computes otherwise.

    Args:
        layer: A frozen linear layer.
        grad: G, (T, m), contiguous.
    """
    if not multiplies_in_float8(layer, grad.dtype) or not len(grad):
        return None
    return _input_gradient(layer, grad)


def _input_gradient(layer: Any, grad: Tensor) -> Tensor:
    from moka_pl.ops.triton.float8 import multiply, scale_rows

    return multiply(scale_rows(grad), _weight(layer, transposed=True), grad.dtype)  # (T, n)


class Float8Product(torch.autograd.Function):
    """``W x + bias`` of a frozen 4-bit layer in 8 bits, whose W is made again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, bias: Tensor | None, layer: Any, held: Held | None = None) -> Any:
        """Maps x to (T, m), and to a link where x is held.

        A view made here could not be changed in place by a model.

        Args:
            ctx: Autograd's context.
            source: The input, (..., n), or what stands for it.
            bias: The bias, (m,), or None.
            layer: The layer.
            held: The input of a layer that shares it.
        """
        from moka_pl.ops.triton.float8 import multiply, scale_input

        x = source if held is None else held.x
        ctx.layer, ctx.shape = layer, x.shape
        rows = x.reshape(-1, x.shape[-1]).contiguous()  # (T, n)
        out = multiply(scale_input(rows), _weight(layer, transposed=False), x.dtype, bias)
        if held is None:
            return out
        ctx.set_materialize_grads(False)
        return out, new_link(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Returns the gradient of x, (..., n)."""
        if grad is None or not ctx.needs_input_grad[0]:
            return total, None, None, None
        grad_x = _input_gradient(ctx.layer, grad.contiguous()).view(ctx.shape)
        # A product in 8 bits cannot add itself to anything.
        return grad_x if total is None else grad_x.add_(total), None, None, None


def _source(layer: Any) -> "WeightSource | None":
    """The layer's weight as the kernels read it; None where they do not, or its sizes do not allow it."""
    from moka_pl.ops.triton import can_dequantise
    from moka_pl.ops.triton.float8 import DIVISOR

    m, n = layer.out_features, layer.in_features
    if m % DIVISOR or n % DIVISOR or m * n >= 2**31 or layer.weight.quant_state is None:
        return None
    source = kernel_weight(layer, torch.bfloat16, even=True, exact=False)
    return source if can_dequantise(source, m * n) else None


def _weight(layer: Any, transposed: bool) -> "Scaled":
    """W in 8 bits, asked for each time: in the backward pass it may lie elsewhere."""
    from moka_pl.ops.triton.float8 import scale_weight

    source, scales = _source(layer), getattr(layer, _SCALES)
    assert source is not None
    device = source.data.device
    if scales.rows.device != device:
        scales = type(scales)(*(scale.to(device) for scale in scales))
        setattr(layer, _SCALES, scales)
    return scale_weight(source, scales, transposed)
