"""The grouped operations against the general ones."""

import pytest
import torch

from moka_pl.filters import filter_shapes
from moka_pl.grouped import add_delta, can_group, project
from moka_pl.kronecker import delta_weight, project_gradient
from moka_pl.packing import pack, unpack
from moka_pl.shape import Shape

CASES = {
    "five shapes twice": (filter_shapes("diverse", 10, 24, 48), 24, 48),
    "one for all": (filter_shapes("square", 4, 12, 20), 12, 20),
    "mixed numbers": ((Shape(2, 3, 6, 4), Shape(4, 2, 3, 6), Shape(2, 3, 6, 4), Shape(2, 3, 6, 4)), 12, 12),
    "one": (filter_shapes("diverse", 1, 6, 15), 6, 15),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_grouped_sums_and_gradients_are_the_general_ones(case) -> None:
    shapes, m, n = case
    assert can_group(shapes, m, n)
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = [(draw(s.m_a, s.n_a), draw(s.m_b, s.n_b)) for s in shapes]
    base, weights, grad = draw(m, n), draw(len(shapes)), draw(m, n)
    left, right = pack(factors)
    kept = base.clone()
    found = add_delta(base, left, right, weights, shapes)
    torch.testing.assert_close(found, base + delta_weight(weights, factors, shapes, m, n))
    assert torch.equal(base, kept)
    grad_left, grad_right, grad_weights = project(grad.mT.contiguous().mT, left, right, weights, shapes)
    expected, pairs = project_gradient(grad, weights, factors, shapes)
    torch.testing.assert_close(grad_weights, expected)
    for ours, theirs in zip(unpack(grad_left, grad_right, shapes), pairs, strict=True):
        torch.testing.assert_close(ours[0], theirs[0])
        torch.testing.assert_close(ours[1], theirs[1])


def test_padded_and_identity_shapes_are_not_grouped() -> None:
    assert not can_group((Shape(2, 2, 3, 3),), 7, 6)
    assert not can_group(filter_shapes("prime", 2, 12, 12), 12, 12)
