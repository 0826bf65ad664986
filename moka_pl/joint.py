"""A frozen layer and its update as one product: ``y = (W + ΔW) x + bias``.

Beside the frozen layer the update costs one matrix product forward and two backward. Joined to it, it costs
building ``W + ΔW`` instead of W (which a 4-bit layer builds anyway) and the one product that gives the
gradient of ΔW: ``∂L/∂ΔW = Gᵀ X``, which is then pulled back to factors and gates. Neither W + ΔW nor ΔW is
kept.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moka_pl.gating import Gating, gates_of, logits_gradient
from moka_pl.grouped import add_delta_, project
from moka_pl.shape import Shape


class Updates(Protocol):
    """How W + ΔW is built, and how a gradient of ΔW becomes gradients of its parts.

    ``gate`` holds the logits g, (r,), which make α (see :mod:`moka_pl.gating`), or is None for α_i = 1/r.
    """

    def weight(self, left: Tensor, right: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns ``W + ΔW``, shape (m, n), in ``dtype``."""

    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the gradients of ``left``, ``right`` and ``gate`` for ∂L/∂ΔW of shape (m, n)."""


@dataclass(frozen=True, eq=False)
class PlainUpdates:
    """By PyTorch's own operations, for W of full precision.

    Args:
        shapes: r shapes.
        scaling: s.
        dense: Returns W, shape (m, n).
        fresh: Whether ``dense`` makes a new tensor at every call, as dequantising does; ΔW is then added in
            place.
        gating: How gate logits make α.
    """

    shapes: tuple[Shape, ...]
    scaling: float
    dense: Callable[[], Tensor]
    fresh: bool
    gating: Gating = "softmax"

    def weight(self, left: Tensor, right: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Returns ``W + ΔW``, shape (m, n), in ``dtype``."""
        total = self.dense().to(dtype, copy=not self.fresh)  # (m, n)
        weights = self._alpha(gate, right) * self.scaling  # (r,)
        return add_delta_(total, left, right, weights, self.shapes)

    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Returns the gradients of ``left``, ``right`` and ``gate`` for ∂L/∂ΔW of shape (m, n)."""
        alpha = self._alpha(gate, right)  # (r,)
        grad_left, grad_right, found = project(grad, left, right, alpha * self.scaling, self.shapes)
        if gate is None:
            return grad_left, grad_right, None
        return grad_left, grad_right, logits_gradient(alpha, found * self.scaling, self.gating)

    def _alpha(self, gate: Tensor | None, right: Tensor) -> Tensor:
        r = len(self.shapes)
        return right.new_full((r,), 1 / r) if gate is None else gates_of(gate, self.gating)


class JointLinear(torch.autograd.Function):
    """``y = (W + s Σ_i α_i (A_i ⊗ B_i)) x + bias``; saves x, gate logits and factors, no m × n matrix."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate: Tensor | None,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        updates: Updates,
    ) -> Tensor:
        """Maps x of shape (T, n) to (T, m).

        Args:
            ctx: Autograd's context.
            x: Input in the compute dtype.
            gate: Gate logits g, (r,), or None for α_i = 1/r.
            left: Packed left factors.
            right: Packed right factors.
            bias: The frozen layer's bias, (m,), in the compute dtype.
            updates: How W + ΔW is built.
        """
        ctx.save_for_backward(x, gate, left, right)
        ctx.updates = updates
        return F.linear(x, updates.weight(left, right, gate, x.dtype), bias)  # (T, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gate logits and packed factors."""
        x, gate, left, right = ctx.saved_tensors
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ ctx.updates.weight(left, right, gate, x.dtype)  # (T, n)
        grad_left, grad_right, grad_gate = ctx.updates.project(grad.mT @ x, left, right, gate)
        return grad_x, grad_gate, grad_left, grad_right, None, None
