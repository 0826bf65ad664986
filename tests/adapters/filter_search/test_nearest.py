"""Nearest Kronecker products, against brute force in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moka_pl.adapters.filter_search.nearest import captured_share, nearest_products, rearrange
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, pack

sides = st.integers(1, 5)
shapes = st.builds(Shape, sides, sides, sides, sides, st.just(False))
blocks = st.builds(lambda k, m_b, n_b: Shape(k, k, m_b, n_b, identity=True), sides, sides, sides)


def draw(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def product_matrix(pair, shape: Shape, like: torch.Tensor) -> torch.Tensor:
    """A ⊗ B, cut or zero-filled to the size of a layer's matrix."""
    return delta_weight(like.new_ones(1), *pack([pair]), (shape,), *like.shape)


def energy(matrix: torch.Tensor) -> float:
    return float(matrix.square().sum())


@settings(max_examples=60, deadline=None)
@given(shape=shapes, seed=st.integers(0, 99))
def test_a_product_becomes_an_outer_product(shape: Shape, seed: int) -> None:
    a, b = draw(shape.m_a, shape.n_a, seed=seed), draw(shape.m_b, shape.n_b, seed=seed + 1)
    whole = torch.kron(a, b)
    torch.testing.assert_close(rearrange(whole, shape), torch.outer(a.flatten(), b.flatten()))
    assert captured_share(whole, shape) == pytest.approx(1)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, m=st.integers(1, 12), n=st.integers(1, 12), seed=st.integers(0, 99))
def test_rearranging_pads_and_cuts_like_the_layer(shape: Shape, m: int, n: int, seed: int) -> None:
    matrix = draw(m, n, seed=seed)
    fitted = torch.zeros(shape.rows, shape.cols, dtype=matrix.dtype)
    fitted[:m, :n] = matrix[: shape.rows, : shape.cols]
    assert torch.equal(rearrange(matrix, shape), rearrange(fitted, shape))


@settings(max_examples=25, deadline=None)
@given(shape=shapes, extra=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=st.integers(0, 99))
def test_no_alternating_fit_is_nearer(shape: Shape, extra: tuple[int, int], seed: int) -> None:
    """Alternating least squares from many starts finds the minimum without any rearrangement."""
    m, n = shape.rows + extra[0], shape.cols + extra[1]
    matrix = draw(m, n, seed=seed)
    (pair,), energies = nearest_products(matrix, shape)
    left = energy(matrix - product_matrix(pair, shape, matrix))
    assert left == pytest.approx(energy(matrix) - float(energies[0]))
    cut = matrix[: shape.rows, : shape.cols]
    best = float("inf")
    for start in range(6):
        b = draw(shape.m_b, shape.n_b, seed=1000 + start)
        for _ in range(100):
            views = [
                [
                    cut[
                        i * shape.m_b : (i + 1) * shape.m_b,
                        j * shape.n_b : (j + 1) * shape.n_b,
                    ]
                    for j in range(shape.n_a)
                ]
                for i in range(shape.m_a)
            ]
            a = torch.stack([torch.stack([(v * b).sum() for v in row]) for row in views]) / energy(b)
            b = sum(a[i, j] * views[i][j] for i in range(shape.m_a) for j in range(shape.n_a)) / energy(a)
        best = min(best, energy(cut - torch.kron(a, b)))
    best += energy(matrix) - energy(cut)
    assert left <= best + 1e-9
    assert left == pytest.approx(best, rel=0.02, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(shape=shapes, count=st.integers(1, 6), seed=st.integers(0, 99))
def test_several_products_leave_the_smaller_singular_values(shape: Shape, count: int, seed: int) -> None:
    matrix = draw(shape.rows, shape.cols, seed=seed)
    pairs, energies = nearest_products(matrix, shape, count)
    total = sum(torch.kron(a, b) for a, b in pairs)
    sizes = torch.linalg.svdvals(rearrange(matrix, shape))
    assert len(pairs) == min(count, len(sizes))
    assert energy(matrix - total) == pytest.approx(energy(sizes[count:]), abs=1e-9)
    torch.testing.assert_close(energies, sizes[:count].square())
    assert all(energy(a) == pytest.approx(1) for a, _ in pairs)


@pytest.mark.parametrize("noise", [0.1, 1.0])
@pytest.mark.parametrize("shape", [Shape(4, 6, 12, 8), Shape(48, 1, 1, 48), Shape(2, 2, 24, 24)], ids=str)
@pytest.mark.parametrize("count", [1, 3])
def test_single_precision_finds_nearly_the_same(shape: Shape, count: int, noise: float) -> None:
    matrix = draw(48, 4) @ draw(4, 48, seed=1) / 2 + noise * draw(48, 48, seed=2)
    expected, energies = nearest_products(matrix, shape, count)
    found, near = nearest_products(matrix.float(), shape, count)
    torch.testing.assert_close(near.double(), energies, rtol=0.02, atol=0)
    assert float(near[0]) <= float(energies[0]) * (1 + 1e-5)
    exact = sum(product_matrix(pair, shape, matrix) for pair in expected)
    own = sum(product_matrix(pair, shape, matrix.float()) for pair in found).double()
    assert energy(matrix - own) <= energy(matrix - exact) * 1.02


@settings(max_examples=60, deadline=None)
@given(shape=blocks, m=st.integers(1, 20), n=st.integers(1, 20), seed=st.integers(0, 99))
def test_blocks_solve_the_least_squares_problem(shape: Shape, m: int, n: int, seed: int) -> None:
    """I ⊗ B is linear in B: LAPACK's least squares judge, padding and cutting included."""
    matrix = draw(m, n, seed=seed)
    (pair,), energies = nearest_products(matrix, shape)
    assert pair[0] is None
    left = matrix - product_matrix(pair, shape, matrix)
    columns = []
    for entry in torch.eye(shape.m_b * shape.n_b, dtype=torch.float64):
        unit = entry.view(shape.m_b, shape.n_b)
        columns.append(product_matrix((None, unit), shape, matrix).flatten())
    system = torch.stack(columns, 1)
    best = torch.linalg.lstsq(system, matrix.flatten()[:, None], driver="gelsd").solution
    assert energy(left) == pytest.approx(energy(matrix.flatten() - (system @ best)[:, 0]), abs=1e-9)
    assert energy(left) == pytest.approx(energy(matrix) - float(energies[0]), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, cut=st.tuples(st.integers(0, 3), st.integers(0, 3)), seed=st.integers(0, 99))
def test_what_is_cut_makes_the_energy_a_lower_bound(shape: Shape, cut: tuple[int, int], seed: int) -> None:
    matrix = draw(max(shape.rows - cut[0], 1), max(shape.cols - cut[1], 1), seed=seed)
    (pair,), energies = nearest_products(matrix, shape)
    left = energy(matrix - product_matrix(pair, shape, matrix))
    assert left <= energy(matrix) - float(energies[0]) + 1e-9


def test_the_iteration_for_large_matrices_is_exact_enough_and_draws_nothing() -> None:
    shape = Shape(20, 20, 20, 20)
    matrix = draw(400, 400) * 0.05 + torch.kron(draw(20, 20), draw(20, 20, seed=1)) * 0.02
    torch.manual_seed(5)
    before = torch.get_rng_state()
    fast = nearest_products(matrix.float(), shape, 2)[1].double()
    assert torch.equal(before, torch.get_rng_state())
    exact = nearest_products(matrix, shape, 2)[1]
    assert float(fast[0]) == pytest.approx(float(exact[0]), rel=1e-3)
    assert float(fast[1]) == pytest.approx(float(exact[1]), rel=0.15)


def test_nothing_is_missed_of_zero() -> None:
    assert captured_share(torch.zeros(4, 4), Shape(2, 2, 2, 2)) == 1.0
