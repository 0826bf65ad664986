"""The faster kernels serve where they were found to be right, and the others elsewhere."""

import pytest
import torch

from moka_pl.ops.layout import Shape, left_sizes, right_sizes

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")
from triton import TritonError  # noqa: E402

from moka_pl.ops.triton.periods import choice  # noqa: E402
from moka_pl.ops.triton.periods.plan import make_period_plan  # noqa: E402

SHAPES, M, N = (Shape(8, 8, 8, 8),), 64, 64


def _wrong(plan, periods, grad, left, right, gates):
    return tuple(tensor + 1 for tensor in kernels.fused_projection(plan, grad, left, right, gates))


def _too_large(*args):
    raise TritonError("out of resource")


@pytest.mark.parametrize("ours", [None, _wrong, _too_large])
def test_a_projection_that_does_not_agree_is_left_alone(ours, monkeypatch) -> None:
    plan = kernels.Plan(SHAPES, M, N, torch.device("cpu"))
    if ours is not None:
        monkeypatch.setattr(choice, "project_by_periods", ours)
    left, right = torch.randn(sum(left_sizes(SHAPES))), torch.randn(sum(right_sizes(SHAPES)))
    grad, gates = torch.randn(M, N).bfloat16(), kernels.Gates(torch.ones(1))
    found = choice.projection(plan, grad, left, right, gates)
    periods = make_period_plan(plan)
    assert periods is not None
    assert periods.projects is (ours is None)
    for one, other in zip(found, kernels.fused_projection(plan, grad, left, right, gates), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)


def test_nothing_is_tried_while_a_graph_is_recorded(monkeypatch) -> None:
    plan = kernels.Plan(SHAPES, M, N, torch.device("cpu"))
    monkeypatch.setattr(choice, "_recording", lambda: True)
    grad, gates = torch.randn(M, N).bfloat16(), kernels.Gates(torch.ones(1))
    choice.projection(plan, grad, torch.randn(64), torch.randn(64), gates)
    periods = make_period_plan(plan)
    assert periods is not None
    assert periods.projects is None
