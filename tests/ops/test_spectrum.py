"""Norms, singular values and ranks from the factors, against the matrix itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moka_pl.errors import AdapterError
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, pack
from moka_pl.ops.spectrum import (
    Update,
    component_norms,
    inner_product,
    norm_and_stable_rank,
    spectrum_of,
    update_spectrum,
)

SIDES = st.integers(1, 4)


@st.composite
def updates(draw: st.DrawFn, m: int | None = None, n: int | None = None) -> Update:
    """Updates of any shapes: smaller than the layer, larger, or of its size; some with identities."""
    shapes = draw(
        st.lists(
            st.builds(Shape, SIDES, SIDES, SIDES, SIDES, st.just(False))
            | st.builds(lambda k, m_b, n_b: Shape(k, k, m_b, n_b, True), SIDES, SIDES, SIDES),
            min_size=1,
            max_size=3,
        )
    )
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def random(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator)

    factors = [(None if s.identity else random(*s[:2]), random(*s[2:4])) for s in shapes]
    m, n = m or draw(st.integers(1, 12)), n or draw(st.integers(1, 12))
    return Update(random(len(shapes)), *pack(factors), tuple(shapes), m, n)


def matrix(update: Update) -> torch.Tensor:
    weights, left, right, *rest = update
    return delta_weight(weights.double(), left.double(), right.double(), *rest)


@settings(max_examples=50, deadline=None)
@given(updates())
def test_singular_values_and_norms_are_those_of_the_matrix(update: Update) -> None:
    expected = torch.linalg.svdvals(matrix(update))
    found = update_spectrum(update)
    sizes = found.sizes[: len(expected)]
    assert float(found.sizes[len(expected) :].sum()) == pytest.approx(0, abs=1e-6)
    padded = torch.cat([sizes, sizes.new_zeros(len(expected) - len(sizes))])
    torch.testing.assert_close(padded, expected, atol=1e-6 * max(1.0, float(expected[0])), rtol=0)
    assert found.norm == pytest.approx(float(expected.square().sum().sqrt()), abs=1e-9)
    assert found.rank <= update.lora_rank
    singles = [
        update._replace(weights=torch.eye(len(update.shapes))[i] * update.weights)
        for i in range(len(update.shapes))
    ]
    torch.testing.assert_close(component_norms(update), torch.stack([matrix(s).norm() for s in singles]))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_inner_products_are_those_of_the_matrices(data: st.DataObject) -> None:
    one = data.draw(updates())
    other = data.draw(updates(one.m, one.n))
    expected = float((matrix(one) * matrix(other)).sum())
    assert inner_product(one, other) == pytest.approx(expected, abs=1e-9)
    norm, stable = norm_and_stable_rank(one)
    whole = update_spectrum(one)
    assert (norm, stable) == pytest.approx((whole.norm, whole.stable_rank), rel=1e-4, abs=1e-6)


def test_ranks_of_known_spectra() -> None:
    equal = spectrum_of(torch.full((5,), 2.0, dtype=torch.float64), 5, 1e-7)
    assert (equal.rank, equal.stable_rank, equal.entropy_rank) == (5, pytest.approx(5), pytest.approx(5))
    assert equal.norm == pytest.approx(math.sqrt(20))
    two = spectrum_of(torch.tensor([3.0, 1.0, 1e-9], dtype=torch.float64), 10, 1e-7)
    shares = (0.9, 0.1)
    assert (two.rank, two.stable_rank) == (2, pytest.approx(10 / 9))
    assert two.entropy_rank == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares)))
    assert spectrum_of(torch.zeros(3, dtype=torch.float64), 3, 1e-7)[1:] == (0, 0.0, 0.0, 0.0)
    with pytest.raises(AdapterError, match="holds a NaN or an infinity"):
        spectrum_of(torch.tensor([math.inf]), 1, 1e-7)


def test_sizes_are_told_before_memory_is_taken() -> None:
    """A thin shape that fills a huge layer is a matrix of terabytes, and an identity one by itself."""
    wide = Update(
        torch.ones(2),
        torch.ones(2 * 2**20),
        torch.ones(2 * 2**20),
        (Shape(2**20, 1, 1, 2**20),) * 2,
        2**20,
        2**20,
    )
    assert wide.entries > 2**20
    identity = Update(
        torch.ones(1), torch.ones(0), torch.ones(1), (Shape(2**20, 2**20, 1, 1, True),), 2**20, 2**20
    )
    assert identity.entries == 2**40
