"""Shapes of the factors and their parameter counts."""

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from shared.counts import factor_entries

from moka_pl.adapters.filters import PRIME_BUDGET, divisors, filter_shapes
from moka_pl.errors import ConfigError
from moka_pl.ops.layout import Shape

LLAMA2_7B = [(4096, 4096)] * 64  # q_proj and v_proj of 32 layers
LLAMA2_7B_LINEAR = [*[(4096, 4096)] * 4, (11008, 4096), (11008, 4096), (4096, 11008)] * 32
SMOLLM2_LINEAR = [*[(576, 576), (192, 576)] * 2, (1536, 576), (1536, 576), (576, 1536)] * 30
LLAMA3_8B = [(4096, 4096), (1024, 4096)] * 32
HIGHLY_COMPOSITE = [1024, 2048, 4096, 8192, 5120, 14336, 11008, 5040, 3072, 960]


def is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, math.isqrt(number) + 1))


@pytest.mark.parametrize(("layers", "entries"), [(LLAMA2_7B, 5_242_880), (LLAMA3_8B, 3_932_160)])
def test_counts_of_the_paper(layers: list[tuple[int, int]], entries: int) -> None:
    assert factor_entries(layers, "diverse", 10) == entries


def test_moka_s_has_about_a_fifth_fewer_parameters() -> None:
    saved = 1 - factor_entries(LLAMA2_7B, "prime", 10) / factor_entries(LLAMA2_7B, "diverse", 10)
    assert 0.17 <= saved <= 0.23
    sides = [shape.m_b for shape in filter_shapes("prime", 10, 4096, 4096)]
    assert len(set(sides)) == 10
    assert all(map(is_prime, sides))


def test_five_diverse_shapes_of_a_square_layer_are_used_twice() -> None:
    sizes = [(64, 64), (32, 128), (128, 32), (16, 256), (256, 16)]
    expected = [Shape(a, b, 4096 // a, 4096 // b) for a, b in sizes]
    assert [str(shape) for shape in expected[:2]] == ["64×64 ⊗ 64×64", "32×128 ⊗ 128×32"]
    assert filter_shapes("diverse", 10, 4096, 4096) == tuple(expected * 2)


def test_square_takes_one_shape_for_all() -> None:
    assert filter_shapes("square", 3, 4096, 4096) == (Shape(64, 64, 64, 64),) * 3


layer_sizes = st.integers(1, 5000)


@settings(max_examples=300, deadline=None)
@given(
    m=layer_sizes,
    n=layer_sizes,
    components=st.integers(1, 12),
    filters=st.sampled_from(["diverse", "square"]),
)
def test_shapes_cover_any_layer_within_its_size(m: int, n: int, components: int, filters: str) -> None:
    shapes = filter_shapes(filters, components, m, n)
    assert len(shapes) == components
    for shape in shapes:
        assert not shape.identity
        # Covering, and no factor could be smaller by a row or a column.
        assert shape.rows >= m > shape.m_a * (shape.m_b - 1)
        assert shape.cols >= n > shape.n_a * (shape.n_b - 1)
        assert 1 <= shape.m_a <= m
        assert 1 <= shape.m_b <= m
        assert 1 <= shape.n_a <= n
        assert 1 <= shape.n_b <= n


@settings(max_examples=300, deadline=None)
@given(m=st.integers(64, 5000), n=st.integers(64, 5000), components=st.integers(1, 12))
def test_prime_blocks_cover_any_layer_and_never_align(m: int, n: int, components: int) -> None:
    shapes = filter_shapes("prime", components, m, n)
    sides = [shape.n_b if n > m else shape.m_b for shape in shapes]
    assert len(set(sides)) == components
    for shape, side in zip(shapes, sides, strict=True):
        assert shape.identity
        assert shape.m_a == shape.n_a
        assert is_prime(side)
        assert side <= max(m, n)
        assert shape.rows >= m
        assert shape.cols >= n


@settings(max_examples=100, deadline=None)
@given(m=st.sampled_from(HIGHLY_COMPOSITE), n=st.sampled_from(HIGHLY_COMPOSITE))
def test_prime_keeps_to_its_budget_and_uses_most_of_it(m: int, n: int) -> None:
    used = factor_entries([(m, n)], "prime", 10)
    budget = PRIME_BUDGET * 10 * 2 * math.sqrt(m * n)
    assert 0.85 * budget <= used <= budget


@settings(max_examples=200, deadline=None)
@given(m=st.sampled_from(HIGHLY_COMPOSITE), n=st.sampled_from(HIGHLY_COMPOSITE))
def test_factors_of_highly_composite_layers_divide_them_and_are_balanced(m: int, n: int) -> None:
    for shape in filter_shapes("diverse", 5, m, n):
        assert (shape.rows, shape.cols) == (m, n)
        for entries in (shape.m_a * shape.n_a, shape.m_b * shape.n_b):
            assert 0.6 < entries / math.sqrt(m * n) < 1.7


@settings(max_examples=100, deadline=None)
@given(m=layer_sizes, n=layer_sizes, components=st.integers(1, 4), rank=st.integers(1, 64))
def test_servable_covers_any_layer_by_the_cheapest_split_of_its_rank(
    m: int, n: int, components: int, rank: int
) -> None:
    assume(components * rank <= min(m, n))
    shapes = filter_shapes("servable", components, m, n, rank)
    (shape,) = set(shapes)
    assert len(shapes) == components
    assert shape.rank == shape.m_a * shape.n_b == rank
    assert shape.rows >= m > shape.m_a * (shape.m_b - 1)
    assert shape.cols >= n > shape.n_b * (shape.n_a - 1)
    splits = [(a, rank // a) for a in range(1, rank + 1) if rank % a == 0]
    # Rows of the last block, which must not be fewer than what all components have ranks in it.
    splits = [(a, b) for a, b in splits if m - (a - 1) * math.ceil(m / a) >= components * b]
    assert shape.num_parameters == min(a * math.ceil(n / b) + math.ceil(m / a) * b for a, b in splits)
    if m == n and (side := math.isqrt(rank)) ** 2 == rank and n % side == 0:
        assert (shape.m_a, shape.n_b, shape.num_parameters) == (side, side, n + m)


@pytest.mark.parametrize(
    ("layers", "rank", "entries"),
    [
        (LLAMA2_7B_LINEAR, 1, 2_498_560),  # as a LoRA of rank 1
        (LLAMA2_7B_LINEAR, 8, 2_625_536),
        (LLAMA2_7B_LINEAR, 16, 2_498_560),
        (LLAMA2_7B_LINEAR, 256, 2_498_560),
        (SMOLLM2_LINEAR, 16, 305_280),
    ],
)
def test_counts_of_servable_components(layers: list[tuple[int, int]], rank: int, entries: int) -> None:
    shapes = [shape for m, n in layers for shape in filter_shapes("servable", 1, m, n, rank)]
    assert sum(shape.num_parameters for shape in shapes) == entries


@pytest.mark.parametrize(
    ("m", "n", "components", "remedy"),
    [
        (8, 576, 2, "at most rank 8, not 32 .components × rank = 2 × 16.; set rank to at most 4, or add"),
        (1, 576, 2, "set at most 1 components with rank 1"),
    ],
)
def test_layers_too_small_for_a_rank_are_refused(m: int, n: int, components: int, remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        filter_shapes("servable", components, m, n)


@pytest.mark.parametrize("size", [4099, 2 * 2503])  # without a divisor near the square root
def test_layers_without_near_divisors_are_padded(size: int) -> None:
    (shape,) = filter_shapes("square", 1, size, size)
    assert size < shape.rows < 1.05 * size
    assert shape.num_parameters < 2.1 * size


@given(number=st.integers(1, 3000))
def test_divisors(number: int) -> None:
    assert divisors(number) == tuple(d for d in range(1, number + 1) if number % d == 0)


def test_two_listed_numbers_are_completed_and_four_are_taken() -> None:
    assert filter_shapes([[3, 4], [2, 5, 6, 7]], 2, 10, 30) == (Shape(3, 4, 4, 8), Shape(2, 5, 6, 7))


def test_one_listed_shape_serves_all_components() -> None:
    assert filter_shapes([[2, 5, 6, 7]], 3, 10, 30) == (Shape(2, 5, 6, 7),) * 3
    assert filter_shapes([[3, 4, 9]], 2, 10, 30) == (Shape(3, 3, 4, 9, identity=True),) * 2


def test_counts_of_identity_and_listed_shapes() -> None:
    assert Shape(9, 9, 2, 3, identity=True).num_parameters == 6
    assert factor_entries([(10, 30)], [[3, 4], [2, 5, 6, 7]], 2) == (12 + 32) + (10 + 42)


@pytest.mark.parametrize(
    ("filters", "components", "message"),
    [
        ("cubic", 2, r"'cubic'.*diverse, square, prime"),
        ("diverse", 0, "at least 1, not 0"),
        ([], 2, "0 shapes for 2 components"),
        ([[1, 1], [2, 2]], 3, "2 shapes for 3 components"),
        ([[1, 2, 3, 4, 5]], 2, r"\[1, 2, 3, 4, 5\] is not"),
        ([[2, 17, 2]], 2, "larger"),
        ([[2.0, 4]], 2, r"\[2\.0, 4\] is not"),
        ([[2, -4]], 2, r"\[2, -4\] is not"),
        ([[2, 0]], 2, r"\[2, 0\] is not"),
        ([[True, 2]], 2, r"\[True, 2\] is not"),
        ([4], 2, "4 is not"),
        (["12"], 2, "'12' is not"),
        ([[17, 2]], 2, r"\[17, 2\].*larger than the layer \(16 outputs, 24 inputs\)"),
        ([[2, 25]], 2, "larger"),
        ([[2, 2, 17, 2]], 2, "larger"),
        ([[2, 2, 2, 25]], 2, "larger"),
    ],
)
def test_what_cannot_work_is_refused(filters: object, components: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        filter_shapes(filters, components, 16, 24)


@settings(deadline=None)
@given(m=layer_sizes, n=layer_sizes, m_a=layer_sizes, n_a=layer_sizes)
def test_two_listed_numbers_cover_the_layer(m: int, n: int, m_a: int, n_a: int) -> None:
    assume(m_a <= m and n_a <= n)
    (shape,) = filter_shapes([[m_a, n_a]], 1, m, n)
    assert (shape.m_a, shape.n_a) == (m_a, n_a)
    assert shape.rows >= m
    assert shape.cols >= n
