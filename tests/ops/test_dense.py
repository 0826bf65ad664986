"""The dense operations against torch.kron: shapes that come several times, in any order, fitting or not."""

import pytest
import torch
from torch.nn import functional as F

from moka_pl.adapters.filters import filter_shapes
from moka_pl.ops.dense import add_delta_, project
from moka_pl.ops.layout import Shape, pack

CASES = {
    "five shapes twice": (filter_shapes("diverse", 10, 24, 48), 24, 48),
    "one for all": (filter_shapes("square", 4, 12, 20), 12, 20),
    "many narrow ones": (filter_shapes("square", 12, 12, 20), 12, 20),
    "mixed numbers": ((Shape(2, 3, 6, 4), Shape(4, 2, 3, 6), Shape(2, 3, 6, 4), Shape(2, 3, 6, 4)), 12, 12),
    "one": (filter_shapes("diverse", 1, 6, 15), 6, 15),
    "padded and cut": ((Shape(2, 2, 3, 3), Shape(3, 4, 3, 3), Shape(2, 2, 3, 3)), 7, 11),
    "identities": (filter_shapes("prime", 3, 12, 20), 12, 20),
    "identities among others": (
        (Shape(4, 4, 3, 3, True), Shape(2, 3, 6, 4), Shape(4, 4, 3, 3, True), Shape(3, 3, 5, 2, True)),
        12,
        12,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_sums_and_gradients_are_those_of_the_kronecker_products(case) -> None:
    shapes, m, n = case
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    factors = [(None if s.identity else draw(s.m_a, s.n_a), draw(s.m_b, s.n_b)) for s in shapes]
    base, grad = draw(m, n), draw(n, m).mT  # not contiguous, as the gradient of a product may be
    left, right = (part.requires_grad_() for part in pack(factors))
    weights = draw(len(shapes)).requires_grad_()

    expected = base
    rights = iter(right.split([s.m_b * s.n_b for s in shapes]))
    lefts = iter(left.split([s.m_a * s.n_a for s in shapes if not s.identity]))
    for weight, s in zip(weights, shapes, strict=True):
        a = torch.eye(s.m_a, s.n_a).double() if s.identity else next(lefts).view(s.m_a, s.n_a)
        cut = torch.kron(a, next(rights).view(s.m_b, s.n_b))[:m, :n]
        expected = expected + weight * F.pad(cut, (0, n - cut.shape[1], 0, m - cut.shape[0]))
    found = add_delta_(base.clone(), left, right, weights, shapes)
    torch.testing.assert_close(found, expected)

    leaves = [left, right, weights] if left.numel() else [right, weights]
    reference = torch.autograd.grad(expected, leaves, grad)
    torch.testing.assert_close(torch.autograd.grad(found, leaves, grad), reference)
    with torch.no_grad():
        projected = project(grad, left, right, weights, shapes)
    torch.testing.assert_close(projected[-len(leaves) :], reference)


def test_what_an_evaluation_builds_first_serves_training() -> None:
    shapes = (Shape(8, 8, 5, 7), Shape(4, 8, 10, 7))  # right factors of different sizes
    factors = [(torch.randn(s.m_a, s.n_a).double(), torch.randn(s.m_b, s.n_b).double()) for s in shapes]
    left, right = pack(factors)
    weights = torch.tensor([0.3, 0.7], dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        add_delta_(
            torch.zeros(40, 56).double(), left.clone(), right.clone(), weights.detach().clone(), shapes
        )
    add_delta_(torch.zeros(40, 56).double(), left, right, weights, shapes).sum().backward()
    expected = [torch.kron(a, b).sum() for a, b in factors]
    torch.testing.assert_close(weights.grad, torch.stack(expected))
