"""Tiles of ΔW that components of several shapes share; run with ``pytest -m gpu``."""

import pytest
import torch
from torch import nn

from moka_pl.adapters.filters import filter_shapes
from moka_pl.backbone.quantization import dense_weight, kernel_weight, quantised_linear
from moka_pl.ops.dense import project
from moka_pl.ops.layout import left_sizes, right_sizes
from moka_pl.ops.triton import Gates, fused_weight, make_plan
from moka_pl.ops.triton.periods import choice
from moka_pl.ops.triton.periods.plan import make_period_plan

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("components", [1, 5, 10, 20])
@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (5120, 5120)])
def test_tiles_that_shapes_share(m: int, n: int, components: int) -> None:
    torch.manual_seed(m + n)
    shapes = filter_shapes("diverse", components, m, n)
    plan = make_plan(shapes, m, n, torch.device("cuda"))
    left = torch.randn(sum(left_sizes(shapes)), device="cuda") / 64
    right = torch.randn(sum(right_sizes(shapes)), device="cuda") / 64
    weights = torch.randn(components, device="cuda")
    grad = torch.randn(m, n, device="cuda", dtype=torch.bfloat16)
    found = choice.projection(plan, grad, left, right, Gates(weights))
    periods = make_period_plan(plan)
    assert periods is not None
    assert periods.projects  # as tried
    exact = project(grad.double(), left.double(), right.double(), weights.double(), shapes)
    for ours, expected in zip(found, exact, strict=True):
        bound = 1e-3 if expected.numel() == components else 1e-4  # sums of the weights cancel
        assert (ours.double() - expected).norm() < bound * expected.norm()
    again = choice.projection(plan, grad, left, right, Gates(weights))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    layer = quantised_linear(nn.Linear(n, m), torch.randn(m, n) / 64, "nf4", True, torch.bfloat16).cuda()
    source = kernel_weight(layer, torch.bfloat16, even=True)
    total = choice.weight(plan, left, right, Gates(weights), torch.bfloat16, source)
    other = fused_weight(plan, left, right, Gates(weights), torch.bfloat16, source)
    assert (total != other).float().mean() < 2e-3
    frozen = choice.weight(plan, left, 0 * right, Gates(weights), torch.bfloat16, source)
    assert torch.equal(frozen, dense_weight(layer).to(torch.bfloat16))
    if len(periods.groups) == 1 and components >= 10:
        assert periods.builds
