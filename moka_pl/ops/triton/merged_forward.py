"""The merged forward by the kernels; its reference is :mod:`moka_pl.ops.merged_forward`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from moka_pl.ops.merged_forward import DenseUpdates
from moka_pl.ops.triton.base_weight import WeightSource
from moka_pl.ops.triton.delta import fused_weight
from moka_pl.ops.triton.gates import layer_gates
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.projection import fused_projection


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
        source = self.source
        if source is None and self.base_weight is not None:
            source = WeightSource(self.base_weight())
        gates = layer_gates(self.plan, gate, self.scaling, self.gating)
        return fused_weight(self.plan, left, right, gates, dtype, source)

    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As :meth:`DenseUpdates.project`."""
        gates = layer_gates(self.plan, gate, self.scaling, self.gating)
        grad_left, grad_right, grad_gate = fused_projection(self.plan, grad, left, right, gates)
        return grad_left, grad_right, None if gate is None else grad_gate
