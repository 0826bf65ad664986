"""A frozen layer and its update as one operation: ``y = (W + ΔW) x + bias``.

Beside the frozen layer the update costs one matrix product forward and two backward. Merged with it, it costs
building ``W + ΔW`` instead of W (which a 4-bit layer builds anyway) and the one product that gives the
gradient of ΔW: ``∂L/∂ΔW = Gᵀ X``, which is then projected to factors and gates. Neither W + ΔW nor ΔW is
kept.

For few tokens products with the small factors are cheaper than building ΔW. Merged with the frozen layer,
they share its transposed input and add to its result in place.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moka_pl.ops.dense import add_delta_, project
from moka_pl.ops.gating import Gating, gates_of, logits_gradient
from moka_pl.ops.layout import Shape
from moka_pl.ops.structured import add_update_, transposed, update_backward


class Updates(ABC):
    """How the merged forward is computed, and its gradients: here by building W + ΔW.

    ``gate`` holds the logits g, (r,), which make α (see :mod:`moka_pl.ops.gating`), or is None for α_i = 1/r.
    """

    def product(
        self, x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> Tensor:
        """Computes ``(W + ΔW) x + bias``.

        Args:
            x: Input, shape (T, n).
            bias: Bias of the frozen layer, (m,), or None.
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.

        Returns:
            Shape (T, m).
        """
        return F.linear(x, self.weight(left, right, gate, x.dtype), bias)

    def backward(
        self, grad: Tensor, x: Tensor, left: Tensor, right: Tensor, gate: Tensor | None, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Computes the gradients of :meth:`product`.

        Args:
            grad: Gradient of the result, shape (T, m).
            x: Input, shape (T, n).
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.
            needs_x: Whether the gradient of ``x`` is wanted.

        Returns:
            The gradients of ``x`` (None unless wanted), ``left``, ``right`` and ``gate``.
        """
        grad_x = grad @ self.weight(left, right, gate, x.dtype) if needs_x else None  # (T, n)
        return grad_x, *self.project(grad.mT @ x, left, right, gate)

    @abstractmethod
    def weight(self, left: Tensor, right: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Builds ``W + ΔW``.

        Args:
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.
            dtype: Dtype of the result.

        Returns:
            Shape (m, n).
        """

    @abstractmethod
    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Projects a gradient of ΔW to its parts.

        Args:
            grad: D = ∂L/∂ΔW, shape (m, n).
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.

        Returns:
            The gradients of ``left``, ``right`` and ``gate``.
        """


@dataclass(frozen=True, eq=False)
class DenseUpdates(Updates):
    """By PyTorch's own operations, for W of full precision.

    Args:
        shapes: r shapes.
        scaling: s.
        base_weight: Returns W, shape (m, n).
        fresh: Whether ``base_weight`` makes a new tensor at every call, as dequantising does; ΔW is then
            added in place.
        gating: How gate logits make α.
    """

    shapes: tuple[Shape, ...]
    scaling: float
    base_weight: Callable[[], Tensor]
    fresh: bool
    gating: Gating = "softmax"

    def weight(self, left: Tensor, right: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As :meth:`Updates.weight`."""
        total = self.base_weight().to(dtype, copy=not self.fresh)  # (m, n)
        weights = self._alpha(gate, right) * self.scaling  # (r,)
        return add_delta_(total, left, right, weights, self.shapes)

    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`Updates.project`."""
        alpha = self._alpha(gate, right)  # (r,)
        grad_left, grad_right, grad_weights = project(grad, left, right, alpha * self.scaling, self.shapes)
        return grad_left, grad_right, self._gate_gradient(gate, alpha, grad_weights)

    def _alpha(self, gate: Tensor | None, right: Tensor) -> Tensor:
        r = len(self.shapes)
        return right.new_full((r,), 1 / r) if gate is None else gates_of(gate, self.gating)

    def _gate_gradient(self, gate: Tensor | None, alpha: Tensor, grad_weights: Tensor) -> Tensor | None:
        """The gradient of the logits, (r,), for that of the weights s α."""
        if gate is None:
            return None
        return logits_gradient(alpha, grad_weights * self.scaling, self.gating)


class StructuredUpdates(DenseUpdates):
    """The same without building ΔW, by products with the small factors."""

    def product(
        self, x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> Tensor:
        """As :meth:`Updates.product`."""
        # The frozen layer's own product: W xᵀ rounds otherwise on some CPUs, and step 0 would differ.
        frozen = F.linear(x, self.base_weight().to(x.dtype), bias)  # (T, m)
        x, out = transposed(x, x.dtype), transposed(frozen, x.dtype)  # (n, T), (m, T)
        weights = self._alpha(gate, right) * self.scaling  # (r,)
        return transposed(add_update_(out, x, left, right, weights, self.shapes), x.dtype)  # (T, m)

    def backward(
        self, grad: Tensor, x: Tensor, left: Tensor, right: Tensor, gate: Tensor | None, needs_x: bool
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """As :meth:`Updates.backward`."""
        grad, x = transposed(grad, x.dtype), transposed(x, x.dtype)  # (m, T), (n, T)
        grad_x = self.base_weight().to(x.dtype).mT @ grad if needs_x else None  # (n, T)
        alpha = self._alpha(gate, right)  # (r,)
        parts = left, right, alpha * self.scaling
        grad_left, grad_right, grad_weights = update_backward(grad, x, *parts, self.shapes, grad_x)
        grad_x = None if grad_x is None else transposed(grad_x, x.dtype)  # (T, n)
        return grad_x, grad_left, grad_right, self._gate_gradient(gate, alpha, grad_weights)


class MergedForward(torch.autograd.Function):
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
            updates: How the product is computed.
        """
        ctx.save_for_backward(x, gate, left, right)
        ctx.updates = updates
        return updates.product(x, bias, left, right, gate)  # (T, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, gate logits and packed factors."""
        x, gate, left, right = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0]
        grad_x, grad_left, grad_right, grad_gate = ctx.updates.backward(grad, x, left, right, gate, needs_x)
        return grad_x, grad_gate, grad_left, grad_right, None, None
