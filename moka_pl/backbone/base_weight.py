"""The dense weight of a frozen linear layer, whatever its storage."""

import torch
from torch import Tensor, nn

from moka_pl.backbone.quantization import is_4bit
from moka_pl.errors import AdapterError


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
