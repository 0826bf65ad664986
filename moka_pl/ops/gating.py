"""The gates α of a layer's components: from logits g to α, gradients, entropy."""

import math
from typing import Literal

import torch
from torch import Tensor

Gating = Literal["softmax", "sigmoid", "none"]

#: What α is with each kind of gating; all start at α_i = 1/r, the trained ones from g = 0.
GATINGS: dict[str, str] = {
    "softmax": "α = softmax(g)",
    "sigmoid": "α_i = (2/r) sigmoid(g_i)",
    "none": "α_i = 1/r",
}


def gates_of(logits: Tensor, gating: Gating) -> Tensor:
    """Computes α, shape (..., r), from gate logits of that shape; differentiable.

    Softmax gates sum to 1; sigmoid gates are independent, each from 0 to 2/r; ``none`` takes α itself.
    """
    if gating == "none":
        return logits
    if gating == "sigmoid":
        return logits.sigmoid() * (2 / logits.shape[-1])
    return logits.softmax(-1)


def can_move(gating: Gating, components: int) -> bool:
    """Whether training moves the gates; the softmax of a single logit is always 1."""
    return gating == "sigmoid" or (gating == "softmax" and components > 1)


def logits_gradient(gates: Tensor, grad: Tensor, gating: Gating) -> Tensor:
    """Returns the gradient of the gate logits, ∂L/∂g, shape (r,), for that of α.

    Args:
        gates: α, shape (r,).
        grad: ∂L/∂α, shape (r,).
        gating: As for :func:`gates_of`.
    """
    if gating == "none":
        return grad
    if gating == "sigmoid":
        return gates * (1 - gates * (len(gates) / 2)) * grad  # dα_i/dg_i = α_i (1 - r α_i / 2)
    return gates * (grad - (gates * grad).sum())  # dα_i/dg_j = α_i (δ_ij - α_j)


def normalised_entropy(gates: Tensor) -> Tensor:
    """Entropies −Σ p_i ln p_i / ln r, shape (...), of α, shape (..., r), with each gate's share p = α / Σ α.

    They lie between 0 and 1; that of a single component, which has no choice, is 1.
    """
    r = gates.shape[-1]
    if r == 1:
        return torch.ones_like(gates[..., 0])
    shares = gates / gates.sum(-1, keepdim=True).clamp(min=torch.finfo(gates.dtype).tiny)
    return -torch.xlogy(shares, shares).sum(-1) / math.log(r)
