"""W + ΔW by matrix products, under Triton's interpreter where there is no GPU."""

import pytest
import torch
from torch import nn

from moka_pl.backbone.quantization import kernel_weight, quantised_linear
from moka_pl.ops.gating import Gating, gates_of
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, left_sizes, right_sizes

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")
from moka_pl.ops.triton.periods.delta import weight_by_periods  # noqa: E402
from moka_pl.ops.triton.periods.plan import make_period_plan  # noqa: E402
from moka_pl.ops.triton.reference import round_by_thresholds  # noqa: E402

SHAPES, M, N = (Shape(17, 4, 8, 16), Shape(17, 8, 8, 8)), 136, 64


@pytest.mark.parametrize(("nested", "gating"), [(True, "softmax"), (False, "sigmoid")])
def test_it_is_the_weight(nested: bool, gating: Gating) -> None:
    torch.manual_seed(0)
    plan = kernels.make_plan(SHAPES, M, N, torch.device("cpu"))
    periods = make_period_plan(plan)
    assert periods is not None
    layer = quantised_linear(nn.Linear(N, M), torch.randn(M, N) / 50, "nf4", nested, torch.bfloat16)
    source = kernel_weight(layer, torch.bfloat16, even=True)
    left, right = torch.randn(sum(left_sizes(SHAPES))) / 8, torch.randn(sum(right_sizes(SHAPES))) / 8
    logits = torch.randn(2)
    gates = kernels.layer_gates(plan, logits, 1.5, gating)
    found = weight_by_periods(plan, periods, left, right, gates, source)
    frozen = kernels.dequantise(source, M, N, torch.bfloat16)
    weights = gates_of(logits.double(), gating) * 1.5
    total = frozen.double() + delta_weight(weights, left.double(), right.double(), SHAPES, M, N)
    # The same threshold for the same entry, as in the other kernel: but for a few of them bit for bit.
    assert (found != round_by_thresholds(total.float())).float().mean() < 1e-2
    torch.testing.assert_close(found.double(), total, atol=1e-5, rtol=2**-6)
    assert torch.equal(weight_by_periods(plan, periods, left, 0 * right, gates, source), frozen)
