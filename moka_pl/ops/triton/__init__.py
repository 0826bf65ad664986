"""Triton kernels: ΔW built, or added to a frozen weight, in one launch; thin products in few passes.

Every kernel names its plain reference in :mod:`moka_pl.ops`, which the tests hold it to.

They work on a layer's factors as two flat vectors (see :mod:`moka_pl.ops.layout`) and serve any mixture of
shapes, whether they divide the layer or not. Sums run in float32 and in a fixed order: results do not change
from run to run.
"""

from moka_pl.ops.triton.base_weight import WeightSource
from moka_pl.ops.triton.decode import add_decode_update_
from moka_pl.ops.triton.delta import fused_weight, fused_weights
from moka_pl.ops.triton.dequantise import can_dequantise, dequantise
from moka_pl.ops.triton.gates import Gates, layer_gates
from moka_pl.ops.triton.merged_forward import FusedThinUpdates, FusedUpdates
from moka_pl.ops.triton.nll import nll_of_logits
from moka_pl.ops.triton.plan import Plan, make_plan
from moka_pl.ops.triton.projection import fused_projection
from moka_pl.ops.triton.thin.matrices import merged_weight, thin_matrices
from moka_pl.ops.triton.thin.plan import ThinPlan, make_thin_plan
from moka_pl.ops.triton.thin.rows import add_thin_rows_

__all__ = [
    "FusedThinUpdates",
    "FusedUpdates",
    "Gates",
    "Plan",
    "ThinPlan",
    "WeightSource",
    "add_decode_update_",
    "add_thin_rows_",
    "can_dequantise",
    "dequantise",
    "fused_projection",
    "fused_weight",
    "fused_weights",
    "layer_gates",
    "make_plan",
    "make_thin_plan",
    "merged_weight",
    "nll_of_logits",
    "thin_matrices",
]
