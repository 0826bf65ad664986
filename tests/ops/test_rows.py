"""Updates of rows with adapters of their own, compared with ΔW of each."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, left_sizes, right_sizes
from moka_pl.ops.rows import rows_update, stack_factors

sizes = st.integers(1, 5)


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    m_a, n_a, m_b, n_b = (draw(sizes) for _ in range(4))
    return Shape(m_a, m_a, m_b, n_b, True) if draw(st.booleans()) else Shape(m_a, n_a, m_b, n_b)


@settings(deadline=None, max_examples=40)
@given(st.lists(shapes(), min_size=1, max_size=4), st.integers(1, 12), st.integers(1, 12), st.integers(1, 3))
def test_each_row_has_the_update_of_its_adapter(listed: list[Shape], m: int, n: int, tokens: int) -> None:
    layout = (*listed, listed[0])  # two of one shape
    generator = torch.Generator().manual_seed(m * n)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    left, right = draw(3, sum(left_sizes(layout))), draw(3, sum(right_sizes(layout)))
    weights, x = draw(3, len(layout)), draw(4, tokens, n)
    adapter = torch.tensor([2, 0, 2, 1])
    stacked = stack_factors(left, right, weights, layout)
    out = rows_update(x, stacked, adapter, m)
    for row, k in enumerate(adapter.tolist()):
        delta = delta_weight(weights[k], left[k], right[k], layout, m, n)  # (m, n)
        torch.testing.assert_close(out[row], x[row] @ delta.T)
