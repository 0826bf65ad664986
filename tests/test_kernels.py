"""The Triton kernels, under Triton's interpreter where there is no GPU (see conftest)."""

import pytest
import torch
from torch import Tensor

from moka_pl.filters import filter_shapes
from moka_pl.kronecker import delta_weight, kronecker_linear, project_gradient
from moka_pl.shape import Shape

kernels = pytest.importorskip("moka_pl.kernels")

Factors = list[tuple[Tensor | None, Tensor]]

CASES = {
    "square blocks of 16": ((Shape(2, 4, 16, 32), Shape(1, 8, 32, 16)), 32, 128),
    "blocks of 8": ((Shape(4, 4, 8, 16), Shape(2, 8, 16, 8)), 32, 64),
    "gathered": (filter_shapes("diverse", 5, 30, 42), 30, 42),
    "padded and cut": ((Shape(3, 5, 4, 7), Shape(2, 9, 9, 3), Shape(2, 2, 2, 2)), 11, 26),
    "identity": (filter_shapes("prime", 3, 40, 40), 40, 40),
    "identity, m != n": (filter_shapes("prime", 3, 12, 45), 12, 45),
    "wide loads": ((Shape(16, 8, 16, 64),) * 2, 256, 512),
    "one component": (filter_shapes("diverse", 1, 7, 13), 7, 13),
}


@pytest.fixture(params=CASES, ids=str)
def problem(request: pytest.FixtureRequest) -> tuple[Factors, Tensor, tuple[Shape, ...], int, int]:
    torch.manual_seed(len(request.param))
    shapes, m, n = CASES[request.param]
    factors: Factors = [
        (None if s.identity else torch.randn(s.m_a, s.n_a), torch.randn(s.m_b, s.n_b)) for s in shapes
    ]
    return factors, torch.randn(len(shapes)) * 3, tuple(shapes), m, n


def _double(factors: Factors) -> Factors:
    return [(None if a is None else a.double(), b.double()) for a, b in factors]


def test_the_cases_take_every_path() -> None:
    sides, exact = set(), set()
    for shapes, m, n in CASES.values():
        tables = kernels._tables(tuple(shapes), m, n, torch.device("cpu"))
        sides.add(tables.side)
        exact.add(tables.exact)
    assert sides == {0, 8, 16}
    assert exact == {True, False}


def test_delta_weight_in_one_launch(problem) -> None:
    factors, weights, shapes, m, n = problem
    found = kernels.fused_delta(kernels.pack(factors), weights, shapes, m, n, torch.float32)
    expected = delta_weight(weights.double(), _double(factors), shapes, m, n)
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-5)


def test_projection_of_the_gradient(problem) -> None:
    factors, weights, shapes, m, n = problem
    grad = torch.randn(m, n)
    flat, found = kernels.fused_projection(grad, kernels.pack(factors), weights, shapes)
    expected, pairs = project_gradient(grad.double(), weights.double(), _double(factors), shapes)
    torch.testing.assert_close(found.double(), expected, atol=1e-2, rtol=1e-4)
    torch.testing.assert_close(flat.double(), kernels.pack(pairs), atol=1e-2, rtol=1e-4)


def test_the_whole_product_with_all_gradients() -> None:
    torch.manual_seed(0)
    shapes = filter_shapes("diverse", 3, 12, 20)
    leaves = [torch.randn(2, 5, 20), torch.randn(3)]
    leaves += [torch.randn(s.m_a, s.n_a) for s in shapes] + [torch.randn(s.m_b, s.n_b) for s in shapes]
    upstream = torch.randn(2, 5, 12)

    def run(backend: str, dtype: torch.dtype) -> tuple[Tensor, tuple[Tensor, ...]]:
        own = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        pairs = list(zip(own[2:5], own[5:8], strict=True))
        out = kronecker_linear(own[0], own[1], pairs, shapes, 12, backend)
        return out, torch.autograd.grad(out, own, upstream.to(dtype))

    out, gradients = run("fused", torch.float32)
    expected, references = run("structured", torch.float64)
    torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-4)
    for found, reference in zip(gradients, references, strict=True):
        torch.testing.assert_close(found.double(), reference, atol=1e-2, rtol=1e-4)


def test_non_finite_values_show() -> None:
    shapes = filter_shapes("square", 2, 8, 8)
    factors: Factors = [(torch.ones(s.m_a, s.n_a), torch.ones(s.m_b, s.n_b)) for s in shapes]
    factors[1][1][0, 0] = float("nan")
    delta = kernels.fused_delta(kernels.pack(factors), torch.ones(2), shapes, 8, 8, torch.float32)
    assert delta.isnan().any()


def test_fused_falls_back_where_its_kernels_cannot_run() -> None:
    from moka_pl import kronecker

    kronecker._warn_unfused.cache_clear()
    shapes = filter_shapes("square", 2, 6, 6)
    factors: Factors = [
        (torch.randn(s.m_a, s.n_a).double(), torch.randn(s.m_b, s.n_b).double()) for s in shapes
    ]
    x, weights = torch.randn(4, 6).double(), torch.randn(2).double()
    with pytest.warns(UserWarning, match="dense way"):  # float64 factors
        found = kronecker_linear(x, weights, factors, shapes, 6, "fused")
    torch.testing.assert_close(found, x @ delta_weight(weights, factors, shapes, 6, 6).mT)
