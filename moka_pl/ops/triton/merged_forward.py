"""The merged forward by the kernels; its reference is :mod:`moka_pl.ops.merged_forward`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moka_pl.ops.gating import Gating
from moka_pl.ops.merged_forward import Updates
from moka_pl.ops.triton.base_weight import WeightSource
from moka_pl.ops.triton.delta import fused_weight
from moka_pl.ops.triton.gates import layer_gates
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.projection import fused_projection


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
