"""Products of frozen 4-bit layers on a GPU, whose weights are dequantised by a kernel of this package.

bitsandbytes' kernel takes twice the time of reading and writing the memory. The numbers are the same, bit for
bit, and the backward pass keeps nothing.
"""

from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.backbone.quantization import FrozenProduct, is_four_bit, kernel_weight

#: Tokens above which bitsandbytes dequantises a weight for its product, too; for fewer it has a kernel.
_FEWEST = 1536


def fuse_products(model: nn.Module) -> int:
    """Has the 4-bit layers of a model dequantised by this package's kernel; returns their number.

    Args:
        model: A frozen model on a CUDA device.
    """
    layers: list[Any] = [module for module in model.modules() if is_four_bit(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _weight_source(layer: Any, dtype: torch.dtype) -> Any:
    """The layer's weight as the kernel reads it; None where bitsandbytes computes."""
    if dtype not in (torch.bfloat16, torch.float32) or layer.weight.quant_state is None:
        return None
    from moka_pl.ops.triton import can_dequantise

    source = kernel_weight(layer, dtype, even=True)
    return source if can_dequantise(source, layer.out_features * layer.in_features) else None


def _forward(layer: Any, x: Tensor) -> Tensor:
    """Computes ``W x + bias``, (..., m), as the layer's class does."""
    source, bias = None, layer.bias
    trained = bias is not None and bias.requires_grad
    if (
        x.is_cuda
        and x.numel() > _FEWEST * layer.in_features
        and x.dtype == layer.compute_dtype
        and not trained
    ):
        tracing = torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type)
        source = None if tracing else _weight_source(layer, x.dtype)
    if source is None:
        plain: Tensor = type(layer).forward(layer, x)
        return plain
    bias = None if bias is None else bias.to(x.dtype)
    # The weight is asked for each time: in the backward pass it may lie elsewhere.
    weight = partial(_weight, layer, x.dtype)
    product: Tensor = FrozenProduct.apply(x, bias, weight)  # type: ignore[no-untyped-call]
    return product


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    from moka_pl.ops.triton import dequantise

    return dequantise(_weight_source(layer, dtype), layer.out_features, layer.in_features, dtype)
