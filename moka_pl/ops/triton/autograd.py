"""The kernels as differentiable products: the update beside the frozen layer, and merged with it.

Their references are :mod:`moka_pl.ops.kronecker` and :mod:`moka_pl.ops.merged_forward`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moka_pl.ops.gating import Gating
from moka_pl.ops.merged_forward import Updates
from moka_pl.ops.triton.base_weight import WeightSource
from moka_pl.ops.triton.delta import fused_weight
from moka_pl.ops.triton.gates import Gates, layer_gates
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.projection import fused_projection


class FusedSum(torch.autograd.Function):
    """``Σ_i w_i (A_i ⊗ B_i) x`` through :func:`fused_weight`; saves x, w and the packed factors."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, left: Tensor, right: Tensor, plan: Plan) -> Tensor:
        """Maps x of shape (T, n) to (T, m).

        Args:
            ctx: Autograd's context.
            x: Input in the compute dtype.
            weights: w, (r,), float32.
            left: Packed left factors, float32.
            right: Packed right factors, float32.
            plan: The layer's plan.
        """
        ctx.save_for_backward(x, weights, left, right)
        ctx.plan = plan
        return x @ fused_weight(plan, left, right, Gates(weights), x.dtype).mT  # (T, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and the packed factors."""
        x, weights, left, right = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ fused_weight(ctx.plan, left, right, Gates(weights), x.dtype)  # (T, n)
        delta = grad.mT @ x  # (m, n)
        grad_left, grad_right, grad_weights = fused_projection(ctx.plan, delta, left, right, Gates(weights))
        return grad_x, grad_weights, grad_left, grad_right, None


@dataclass(frozen=True, eq=False)
class FusedUpdates(Updates):
    """By one launch for the weight and two for the gradient; reference: :class:`DenseUpdates`.

    Args:
        plan: The layer's plan.
        scaling: s.
        source: The frozen weight as the kernels read it, or None.
        base_weight: Returns W, shape (m, n), for a storage that the kernels do not read.
        gating: How gate logits make α.
    """

    plan: Plan
    scaling: float
    source: WeightSource | None
    base_weight: Callable[[], Tensor]
    gating: Gating = "softmax"

    def weight(self, left: Tensor, right: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As :meth:`Updates.weight`."""
        source = self.source or WeightSource(self.base_weight())
        gates = layer_gates(self.plan, gate, self.scaling, self.gating)
        return fused_weight(self.plan, left, right, gates, dtype, source)

    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`Updates.project`."""
        gates = layer_gates(self.plan, gate, self.scaling, self.gating)
        grad_left, grad_right, grad_gate = fused_projection(self.plan, grad, left, right, gates)
        return grad_left, grad_right, None if gate is None else grad_gate
