"""The kernel for thin updates of rows with adapters of their own; without a GPU under the interpreter."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moka_pl.ops.layout import Shape, left_sizes, right_sizes
from moka_pl.ops.rows import alike, rows_update, stack_factors

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")

CPU = torch.device("cpu")


@st.composite
def layers(draw: st.DrawFn) -> tuple[Shape, int, int, int]:
    """A shape whose left factor is cheaper first, how many components have it, m and n it meets or not."""
    m_a, n_b = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    n_a, m_b = draw(st.integers(m_a, 40)), draw(st.integers(n_b, 40))
    count = draw(st.integers(1, 3))
    m = max(1, m_a * m_b + draw(st.integers(-1, 1)))
    n = max(1, n_a * n_b + draw(st.integers(-1, 1)))
    return Shape(m_a, n_a, m_b, n_b), count, m, n


@settings(max_examples=30, deadline=None)
@given(layers(), st.integers(1, 40), st.integers(0, 2**31))
def test_each_row_gets_the_update_of_its_adapter(
    layer: tuple[Shape, int, int, int], tokens: int, seed: int
) -> None:
    shape, count, m, n = layer
    shapes = (shape,) * count
    assume(alike(shapes, m))
    torch.manual_seed(seed)
    adapters, batch = 3, 5
    left = torch.randn(adapters, sum(left_sizes(shapes)))
    right = torch.randn(adapters, sum(right_sizes(shapes)))
    factors = stack_factors(left, right, torch.rand(adapters, count), shapes, m)
    x, out = torch.randn(batch, tokens, n), torch.randn(batch, tokens, m)
    rows, adapter = torch.tensor([0, 1, 2, 4]), torch.tensor([2, 0, 2, 1])

    expected = out.double()
    expected[rows] += rows_update(x[rows].double(), factors[adapter].double(), shapes, m)
    plan = kernels.make_plan(shapes, m, n, CPU)
    found = kernels.add_thin_rows_(plan, out, x, factors, shape, rows, adapter)
    assert found is out
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_rounded_as_thin_products_are() -> None:
    torch.manual_seed(0)
    shapes, m, n = (Shape(4, 32, 48, 4),), 192, 128
    left, right = torch.randn(2, sum(left_sizes(shapes))), torch.randn(2, sum(right_sizes(shapes)))
    factors = stack_factors(left, right, torch.ones(2, 1), shapes, m)
    x, rows = torch.randn(2, 20, n).bfloat16(), torch.tensor([0, 1])
    out = torch.zeros(2, 20, m, dtype=torch.bfloat16)
    kernels.add_thin_rows_(kernels.make_plan(shapes, m, n, CPU), out, x, factors, shapes[0], rows, rows)
    exact = rows_update(x.double(), factors.double(), shapes, m)
    assert (out.double() - exact).norm() < 2e-2 * exact.norm()


def test_only_components_of_one_shape_with_cheap_left_factors_are_alike() -> None:
    thin = Shape(4, 32, 48, 4)
    assert alike((thin, thin), 192)
    assert not alike((thin, Shape(2, 64, 96, 2)), 192)
    assert not alike((Shape(48, 4, 4, 32),), 192)
    assert not alike((Shape(4, 32, 48, 4, identity=True),), 192)
