"""Triton kernels: ΔW built, or added to a frozen weight, in one launch; its gradient projected in two.

Every kernel names its plain reference in :mod:`moka_pl.ops`, which the tests hold it to.

They work on a layer's factors as two flat vectors (see :mod:`moka_pl.ops.layout`) and serve any mixture of
shapes, whether they divide the layer or not. Sums run in float32 and in a fixed order: results do not change
from run to run.
"""

from moka_pl.ops.triton.base_weight import WeightSource
from moka_pl.ops.triton.decode import add_decode_update_
from moka_pl.ops.triton.delta import fused_weight
from moka_pl.ops.triton.gates import Gates, layer_gates
from moka_pl.ops.triton.merged_forward import FusedUpdates
from moka_pl.ops.triton.plan import Plan, make_plan
from moka_pl.ops.triton.projection import fused_projection

__all__ = [
    "FusedUpdates",
    "Gates",
    "Plan",
    "WeightSource",
    "add_decode_update_",
    "fused_projection",
    "fused_weight",
    "layer_gates",
    "make_plan",
]
