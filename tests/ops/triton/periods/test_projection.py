"""The projection read once for all shapes, under Triton's interpreter where there is no GPU."""

import pytest
import torch

from moka_pl.adapters.filters import filter_shapes
from moka_pl.ops.dense import project
from moka_pl.ops.layout import Shape, left_sizes, right_sizes

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")
from moka_pl.ops.triton.periods.plan import make_period_plan  # noqa: E402
from moka_pl.ops.triton.periods.projection import project_by_periods  # noqa: E402

CASES = {
    "one shape": ((Shape(16, 16, 8, 8),) * 2, 128, 128),
    "several": ((Shape(8, 16, 16, 8), Shape(16, 8, 8, 16)), 128, 128),
    "no powers of two": ((Shape(10, 14, 24, 8), Shape(30, 7, 8, 16)), 240, 112),
    "two groups": ((Shape(20, 8, 24, 8), Shape(12, 8, 40, 8), Shape(20, 8, 24, 8)), 480, 64),
    "more than a group holds": ((Shape(9, 8, 8, 8),) * 18, 72, 64),
}


@pytest.mark.parametrize(
    ("case", "dtype"), [("several", torch.float32), *((case, torch.bfloat16) for case in CASES)]
)
def test_it_is_the_projection(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(len(case))
    shapes, m, n = CASES[case]
    plan = kernels.make_plan(shapes, m, n, torch.device("cpu"))
    periods = make_period_plan(plan)
    assert periods is not None
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    weights, grad = torch.randn(len(shapes)), torch.randn(m, n).to(dtype)
    found = project_by_periods(plan, periods, grad, left, right, kernels.Gates(weights))
    expected = project(grad.double(), left.double(), right.double(), weights.double(), shapes)
    for ours, exact in zip(found, expected, strict=True):
        scale = exact.abs().max()
        torch.testing.assert_close(ours.double() / scale, exact / scale, atol=1e-4, rtol=1e-4)


def test_components_are_put_into_few_groups() -> None:
    def members(components: int, m: int, n: int) -> list[tuple[int, ...]] | None:
        shapes = filter_shapes("diverse", components, m, n)
        periods = make_period_plan(kernels.make_plan(shapes, m, n, torch.device("cpu")))
        return None if periods is None else [group.members for group in periods.groups]

    assert members(10, 4096, 4096) == [tuple(range(10))]
    assert members(5, 11008, 4096) == [(0, 1, 2, 4), (3,)]  # 344 rows of B share no period with 256
    assert members(10, 576, 576) is None  # tiles of six columns


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_show(bad: float) -> None:
    shapes, m, n = CASES["one shape"]
    plan = kernels.make_plan(shapes, m, n, torch.device("cpu"))
    periods = make_period_plan(plan)
    assert periods is not None
    grad = torch.ones(m, n).bfloat16()
    grad[17, 99] = bad
    factors = torch.ones(sum(left_sizes(shapes))), torch.ones(sum(right_sizes(shapes)))
    for found in project_by_periods(plan, periods, grad, *factors, kernels.Gates(torch.ones(2))):
        assert not found.isfinite().all()
