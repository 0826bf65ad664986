"""The merged forward by the kernels; its references are in :mod:`moka_pl.ops`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.merged_forward import DEQUANTISED_TOKENS, DenseUpdates, Keep
from moka_pl.ops.shared_input import add_product_
from moka_pl.ops.thin import ThinUpdates
from moka_pl.ops.triton.base_weight import WeightSource
from moka_pl.ops.triton.delta import fused_weights
from moka_pl.ops.triton.dequantise import can_dequantise
from moka_pl.ops.triton.factor_gradients import factor_gradients, make_factor_plan
from moka_pl.ops.triton.gates import layer_gates
from moka_pl.ops.triton.periods import choice
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.thin.matrices import merged_weight, thin_matrices
from moka_pl.ops.triton.thin.plan import ThinPlan
from moka_pl.ops.triton.thin.products import (
    thin_backward,
    thin_factor_gradients,
    thin_forward,
    thin_hidden,
)


@dataclass(frozen=True, eq=False)
class FusedUpdates(DenseUpdates):
    """By one launch for the weight and two for the gradient; reference: :class:`DenseUpdates`.

    Args:
        plan: The layer's plan.
        source: The frozen weight as the kernels read it; None for a storage that they do not read.
    """

    plan: Plan
    source: WeightSource | None = None

    def weight(self, left: Tensor, right: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """As :meth:`DenseUpdates.weight`."""
        gates = layer_gates(self.plan, gate, self.scaling, self.gating)
        return choice.weight(self.plan, left, right, gates, dtype, self._own_source())

    def weights(self, left: Tensor, right: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """Builds ``W + ΔW`` of K adapters in one launch, shape (K, m, n).

        Args:
            left: Packed left factors, (K, entries), contiguous, float32.
            right: Packed right factors, likewise.
            weights: Gates times scaling, (K, r), likewise.
            dtype: Dtype of the result.
        """
        return fused_weights(self.plan, left, right, weights, dtype, self._own_source())

    def _own_source(self) -> WeightSource | None:
        if self.source is None and self.base_weight is not None:
            return WeightSource(self.base_weight())
        return self.source

    def factor_gradients(
        self, grad: Tensor, x: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`DenseUpdates.factor_gradients`; without ∂L/∂ΔW where components are few."""
        sums = make_factor_plan(self.plan)
        if sums is None or grad.dtype is not torch.bfloat16 or not sums.usable(len(x)):
            return super().factor_gradients(grad, x, left, right, gate)
        gates = layer_gates(self.plan, gate, self.scaling, self.gating)
        parts = grad.contiguous(), x.contiguous(), left, right, gates
        grad_left, grad_right, grad_gate = factor_gradients(self.plan, sums, *parts)
        return grad_left, grad_right, None if gate is None else grad_gate

    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`DenseUpdates.project`."""
        gates = layer_gates(self.plan, gate, self.scaling, self.gating)
        grad_left, grad_right, grad_gate = choice.projection(self.plan, grad, left, right, gates)
        return grad_left, grad_right, None if gate is None else grad_gate


@dataclass(frozen=True, eq=False, kw_only=True)
class FusedThinUpdates(ThinUpdates):
    """The thin products in one pass forward and two backward; reference: :class:`ThinUpdates`.

    With many tokens ΔW is added to a 4-bit W where that is dequantised, if the plan can: the layer is one
    product then, forward and backward, and the passes are those of the factors' gradients. Else the frozen
    layer's product adds itself to the update, which costs no pass of its own.

    Args:
        plan: The layer's plan.
        source: Returns the frozen 4-bit weight as the kernels read it, or None for a storage that they do not
            read; None where there is no such weight.
    """

    plan: ThinPlan
    source: Callable[[], WeightSource | None] | None = None

    def merges(self, tokens: int) -> bool:
        """As :meth:`ThinUpdates.merges`."""
        return self._merged_source(tokens) is not None

    def product(
        self, x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, gate: Tensor | None, keep: Keep
    ) -> Tensor:
        """As :meth:`ThinUpdates.product`."""
        if x.shape[0] == 0:
            return super().product(x, bias, left, right, gate, keep)
        x = x.contiguous()
        gates = layer_gates(self.plan.plan, gate, self.scaling, self.gating)
        if (source := self._merged_source(len(x))) is not None:
            keep()
            total = merged_weight(self.plan, left, right, gates, x.dtype, source)  # (m, n)
            return F.linear(x, total, bias)
        own = self._own_weight() if bias is None and x.shape[0] > DEQUANTISED_TOKENS else None
        thin, weight = thin_matrices(self.plan, left, right, gates, x.dtype, own)
        if weight is not None:
            update, hidden = thin_forward(self.plan, x, thin)
            keep(hidden)
            return update.addmm_(x, weight.mT)
        out = None if self.frozen is None else self.frozen(x).contiguous()
        total, hidden = thin_forward(self.plan, x, thin, out)
        keep(hidden)
        return total

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        gate: Tensor | None,
        kept: tuple[Tensor, ...],
        needs_x: bool,
        total: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """As :meth:`ThinUpdates.backward`."""
        if x.shape[0] == 0:
            return super().backward(grad, x, left, right, gate, kept, needs_x, total)
        grad, x = grad.contiguous(), x.contiguous()
        gates = layer_gates(self.plan.plan, gate, self.scaling, self.gating)
        merged = not kept
        frozen = self._frozen_gradient(grad) if needs_x and not merged else None  # (T, n)
        own = self._own_weight() if needs_x and frozen is None else None
        thin, weight = thin_matrices(self.plan, left, right, gates, x.dtype, own, merged and needs_x)
        if merged:
            grad_x = None if weight is None else add_product_(total, grad, weight)  # (T, n)
            _, parts = thin_backward(self.plan, grad, x, thin_hidden(self.plan, x, thin), thin, False)
        else:
            if frozen is not None:
                total = frozen if total is None else frozen.add_(total)
            ours = total if needs_x else None
            grad_x, parts = thin_backward(self.plan, grad, x, kept[0], thin, needs_x, ours)
            if grad_x is not None and frozen is None and self.base_weight is not None:
                grad_x.addmm_(grad, self.base_weight().to(grad.dtype) if weight is None else weight)
        grads = thin_factor_gradients(self.plan, parts, right, gates, gate is not None)
        return grad_x, *grads

    def _merged_source(self, tokens: int) -> WeightSource | None:
        """The frozen weight, where the update of so many tokens is added to it."""
        return self._own_weight() if self.plan.merged and tokens > DEQUANTISED_TOKENS else None

    def _own_weight(self) -> WeightSource | None:
        """The frozen weight, where the kernels dequantise it."""
        source = None if self.source is None else self.source()
        return source if can_dequantise(source, self.m * self.n) else None
