"""Gated MLPs whose product is computed again instead of kept.

A trained or adapted down projection keeps its input, the widest of a layer, for its gradient. It is the
product of two tensors that the backward pass needs anyway, and cheap: one pass over the memory.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from moka_pl._compat import saving_hooks


def without_product(forward: Any) -> Any:
    """Returns the method of gated MLPs that keep no product for Liger's own; another one as it is."""
    from liger_kernel.transformers.swiglu import LigerSwiGLUMLP

    return gated_forward if forward is LigerSwiGLUMLP.forward else forward


def gated_forward(mlp: Any, x: Tensor) -> Tensor:
    """Computes ``down (silu(gate x) * up x)``, (..., d), as Liger does, gradients included, bit for bit."""
    from liger_kernel.transformers.swiglu import LigerSiLUMulFunction

    gate, up = mlp.gate_proj(x), mlp.up_proj(x)  # (..., e)
    product: Tensor = LigerSiLUMulFunction.apply(gate, up)
    # What others' hooks keep, such as checkpointing's, is theirs to decide.
    if torch.compiler.is_compiling() or not product.requires_grad or saving_hooks() is not None:
        return mlp.down_proj(product)  # type: ignore[no-any-return]
    with saved_tensors_hooks(_Packing(gate, up, product), _unpack):
        return mlp.down_proj(product)  # type: ignore[no-any-return]


class _Packing:
    """Packs the product as the two tensors, and all else as it is."""

    def __init__(self, gate: Tensor, up: Tensor, product: Tensor) -> None:
        self._parts = gate.detach(), up.detach()
        self._place = product.data_ptr(), product.numel(), product.dtype

    def __call__(self, tensor: Tensor) -> Any:
        same = (tensor.data_ptr(), tensor.numel(), tensor.dtype) == self._place and tensor.is_contiguous()
        return (tensor.shape, self._parts) if same else tensor


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    from liger_kernel.ops.swiglu import swiglu_forward

    shape, parts = packed
    product: Tensor = swiglu_forward(*(part.contiguous() for part in parts))[2]
    return product.view(shape)
