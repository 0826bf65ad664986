"""Updates of rows with adapters of their own, compared with ΔW of each."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.launches import Launches
from torch import Tensor

from moka_pl.adapters import MokaConfig
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, left_sizes, right_sizes
from moka_pl.ops.rows import batched_cost, merged_cost, rows_update, stack_factors

sizes = st.integers(1, 5)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    m_a, n_a, m_b, n_b = (draw(sizes) for _ in range(4))
    return Shape(m_a, m_a, m_b, n_b, True) if draw(st.booleans()) else Shape(m_a, n_a, m_b, n_b)


def compare(layout: tuple[Shape, ...], m: int, n: int, tokens: int, dtype: torch.dtype) -> None:
    """Compares four rows of three adapters with ΔW."""
    generator = torch.Generator().manual_seed(m * n)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    left, right = draw(3, sum(left_sizes(layout))), draw(3, sum(right_sizes(layout)))
    weights, x = draw(3, len(layout)), draw(4, tokens, n)
    adapter = torch.tensor([2, 0, 2, 1])
    stacked = stack_factors(left.to(dtype), right.to(dtype), weights.to(dtype), layout, m)
    factors = stacked[adapter]
    out = rows_update(x.to(dtype), factors, layout, m)
    assert out.dtype is dtype
    added = torch.ones_like(out)
    assert rows_update(x.to(dtype), factors, layout, m, out=added) is added
    torch.testing.assert_close(added, out + 1)
    for row, k in enumerate(adapter.tolist()):
        delta = delta_weight(weights[k], left[k], right[k], layout, m, n)  # (m, n)
        expected = (x[row] @ delta.T).to(dtype)
        loose = {} if dtype is torch.float64 else {"atol": 1e-3, "rtol": 1e-4}
        torch.testing.assert_close(out[row], expected, **loose)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@settings(deadline=None, max_examples=40)
@given(
    st.lists(shapes(), min_size=1, max_size=4),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 3),
    st.booleans(),
)
def test_each_row_has_the_update_of_its_adapter(
    dtype: torch.dtype, listed: list[Shape], m: int, n: int, tokens: int, fits: bool
) -> None:
    if fits:  # the ways of shapes that fill a layer
        m, n = listed[0].rows, listed[0].cols
    compare((*listed, listed[0]), m, n, tokens, dtype)  # two of one shape


@pytest.mark.parametrize("tokens", [1, 3])
def test_shapes_that_fill_a_layer_are_added_up(tokens: int) -> None:
    every = (Shape(2, 4, 6, 2), Shape(6, 2, 2, 4), Shape(4, 4, 3, 2), Shape(1, 1, 12, 8))
    compare((*every, Shape(4, 4, 3, 2, True), *every), 12, 8, tokens, torch.float64)


@pytest.mark.parametrize(
    ("config", "one", "several"),
    [(MokaConfig(), 5 * 2, 5 * 4), (MokaConfig(1, filters="servable"), 2, 4)],
)
def test_a_shape_takes_two_launches_for_a_token_and_four_for_more(
    config: MokaConfig, one: int, several: int
) -> None:
    layout = config.shapes_of("q_proj", 4096, 4096)
    left, right = torch.zeros(3, sum(left_sizes(layout))), torch.zeros(3, sum(right_sizes(layout)))
    stacked = stack_factors(left, right, torch.ones(3, len(layout)), layout, 4096)
    factors = stacked[torch.tensor([0, 2])]
    for tokens, expected in ((1, one), (3, several)):
        x = torch.zeros(2, tokens, 4096)
        with Launches() as launches:
            rows_update(x, factors, layout, 4096)
        assert launches.count == expected


def test_long_rows_of_few_adapters_are_merged_and_short_ones_batched() -> None:
    layout, thin = (c.shapes_of("", 4096, 4096) for c in (MokaConfig(), MokaConfig(1, filters="servable")))

    def batches(shapes: tuple[Shape, ...], adapters: int, tokens: int) -> bool:
        batched = batched_cost(shapes, 4096, 4096, tokens * 2)
        return batched <= merged_cost(adapters, 4096, 4096, tokens, 2, launches=4)

    assert not batches(layout, 8, 32 * 64)
    assert batches(layout, 32, 32 * 64)
    assert batches(thin, 8, 32 * 64)
