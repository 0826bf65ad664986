"""Products of frozen 4-bit layers on a GPU, whose weights are dequantised by a kernel of this package.

bitsandbytes' kernel takes twice the time of reading and writing the memory. The numbers are the same, bit for
bit, unless products are in 8 bits, and the backward pass keeps nothing.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.backbone.products.float8 import float8_product, multiplies_in_float8
from moka_pl.backbone.quantization import FrozenProduct, is_four_bit, kernel_weight
from moka_pl.lm.replaced_forward import replace_forward
from moka_pl.ops.merged_forward import DEQUANTISED_TOKENS
from moka_pl.ops.shared_input import call_sharing


def fuse_products(model: nn.Module) -> int:
    """Has the 4-bit layers of a model dequantised by this package's kernel; returns their number.

    Args:
        model: A frozen model on a CUDA device.
    """
    layers: list[Any] = [module for module in model.modules() if is_four_bit(module)]
    for layer in layers:
        replace_forward(layer, _dequantising)
    return len(layers)


def _weight_source(layer: Any, dtype: torch.dtype) -> Any:
    """The layer's weight as the kernel reads it; None where bitsandbytes computes."""
    if dtype not in (torch.bfloat16, torch.float32) or layer.weight.quant_state is None:
        return None
    from moka_pl.ops.triton import can_dequantise

    source = kernel_weight(layer, dtype, even=True)
    return source if can_dequantise(source, layer.out_features * layer.in_features) else None


def _dequantising(kind: Any) -> Any:
    """The forward method of a class of 4-bit layers, by this package's kernels where these can compute."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        """Computes ``W x + bias``, (..., m)."""
        float8 = _may_compute(layer, x) and multiplies_in_float8(layer, x.dtype)
        if not float8 and not _computes(layer, x):
            return kind.forward(layer, x)  # type: ignore[no-any-return]
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        if float8:
            return float8_product(layer, x, bias)
        # The weight is asked for each time: in the backward pass it may lie elsewhere.
        weight = partial(_weight, layer, x.dtype)
        return call_sharing(FrozenProduct, x, bias, weight)

    return forward


def _may_compute(layer: Any, x: Tensor) -> bool:
    """Whether nothing but sizes and storage can stand against computing the layer's product here."""
    if not x.is_cuda or not x.numel() or x.dtype != layer.compute_dtype:
        return False
    if layer.bias is not None and layer.bias.requires_grad:
        return False
    return not torch.compiler.is_compiling() and not torch.is_autocast_enabled(x.device.type)


def _computes(layer: Any, x: Tensor) -> bool:
    """Whether the layer's product is computed here in its own dtype."""
    many = x.numel() > DEQUANTISED_TOKENS * layer.in_features
    return many and _may_compute(layer, x) and _weight_source(layer, x.dtype) is not None


def _weight(layer: Any, dtype: torch.dtype) -> Tensor:
    from moka_pl.ops.triton import dequantise

    return dequantise(_weight_source(layer, dtype), layer.out_features, layer.in_features, dtype)
