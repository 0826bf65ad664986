"""The update's product on its own, beside the frozen layer's."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moka_pl.ops.triton.delta import fused_delta
from moka_pl.ops.triton.gates import Gates
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.projection import fused_projection


class FusedSum(torch.autograd.Function):
    """``Σ_i w_i (A_i ⊗ B_i) x`` through :func:`fused_delta`; saves x, w and the packed factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, left: Tensor, right: Tensor, plan: Plan) -> Tensor:
        """Maps x of shape (T, n) to (T, m)."""
        ctx.save_for_backward(x, weights, left, right)
        ctx.plan = plan
        return x @ fused_delta(plan, left, right, Gates(weights), x.dtype).mT  # (T, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and the packed factors."""
        x, weights, left, right = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ fused_delta(ctx.plan, left, right, Gates(weights), x.dtype)  # (T, n)
        delta = grad.mT @ x  # (m, n)
        grad_left, grad_right, grad_weights = fused_projection(ctx.plan, delta, left, right, Gates(weights))
        return grad_x, grad_weights, grad_left, grad_right, None
