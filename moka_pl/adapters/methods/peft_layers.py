"""The layers that PEFT has put into a model: finding, merging and silencing them.

Nothing here imports PEFT: a model that has none of its layers needs none of it.
"""

import sys
from typing import Any

import torch
from torch import nn

from moka_pl.backbone.quantization import is_4bit, layer_compute_dtype
from moka_pl.errors import AdapterError


def peft_layers(model: nn.Module) -> dict[str, Any]:
    """All of PEFT's adapted layers by name, in model order."""
    if "peft" not in sys.modules:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def merge_layer(layer: Any, name: str) -> None:
    """Lets a layer compute as one dense layer, without touching its frozen weight.

    PEFT's own merging changes the frozen weight, which in four bits is rounded again and cannot be had back.
    Every linear layer with an adapter maps x to ``W' x + b'``: W' is what it makes of the identity.

    Args:
        layer: A layer of PEFT's.
        name: Its name, for messages.

    Raises:
        AdapterError: If what it wraps is no linear layer.
    """
    if is_merged(layer):
        return
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear):
        raise AdapterError(f"{name} is a {type(base).__name__}; only linear layers can be merged")
    dtype = layer_compute_dtype(base) if is_4bit(base) else base.weight.dtype
    was_training = layer.training
    layer.eval()
    with torch.no_grad():
        eye = torch.eye(base.in_features, dtype=dtype, device=base.weight.device)
        bias = layer(eye.new_zeros(1, base.in_features))  # (1, m)
        weight = layer(eye) - bias  # (n, m)
    layer.train(was_training)
    dense = nn.Linear(base.in_features, base.out_features, device="meta")
    dense.weight = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    dense.bias = nn.Parameter(bias[0], requires_grad=False)
    layer.__dict__["forward"] = _Merged(dense, anything=is_4bit(base))


def unmerge_layer(layer: Any) -> None:
    """Undoes :func:`merge_layer`."""
    if is_merged(layer):
        del layer.__dict__["forward"]


def is_merged(layer: Any) -> bool:
    """Whether :func:`merge_layer` has been here."""
    return isinstance(layer.__dict__.get("forward"), _Merged)


def merged_linear_of(layer: Any) -> nn.Linear:
    """The dense layer of a merged one."""
    dense: nn.Linear = layer.__dict__["forward"].dense
    return dense


class _Merged:
    """Stands in for a layer's ``forward``."""

    def __init__(self, dense: nn.Linear, anything: bool) -> None:
        self.dense = dense
        self.anything = anything  # 4-bit layers take any dtype and return it

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        out: torch.Tensor
        out = self.dense(x.to(self.dense.weight.dtype)).to(x.dtype) if self.anything else self.dense(x)
        return out
