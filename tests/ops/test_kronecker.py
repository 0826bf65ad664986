"""The structured and the dense product against torch.kron, explicitly cut and zero-filled."""

import math
from typing import NamedTuple

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from moka_pl.adapters.filters import filter_shapes
from moka_pl.errors import ConfigError
from moka_pl.ops.dense import project
from moka_pl.ops.dispatch import BACKENDS, pick_backend
from moka_pl.ops.kronecker import (
    delta_weight,
    kronecker_linear,
    lora_factors,
)
from moka_pl.ops.layout import Shape, exact_rank, pack, unpack

PLAIN = ("structured", "dense")
Factors = list[tuple[Tensor | None, Tensor]]


class Case(NamedTuple):
    m: int
    n: int
    shapes: tuple[Shape, ...]
    leading: tuple[int, ...]
    seed: int


def tensors(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Factors]:
    """Random x, weights (unequal, of both signs) and factors, all requiring gradients."""
    generator = torch.Generator().manual_seed(case.seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=dtype).requires_grad_()

    factors: Factors = [(None if s.identity else draw(s.m_a, s.n_a), draw(s.m_b, s.n_b)) for s in case.shapes]
    return draw(*case.leading, case.n), draw(len(case.shapes)), factors


def reference_delta(weights: Tensor, factors: Factors, shapes: tuple[Shape, ...], m: int, n: int) -> Tensor:
    total = torch.zeros(m, n, dtype=weights.dtype)
    for weight, (a, b), shape in zip(weights, factors, shapes, strict=True):
        left = torch.eye(shape.m_a, shape.n_a, dtype=weights.dtype) if a is None else a
        cut = torch.kron(left, b)[:m, :n]
        total = total + weight * F.pad(cut, (0, n - cut.shape[1], 0, m - cut.shape[0]))
    return total


def leaves(x: Tensor, weights: Tensor, factors: Factors) -> list[Tensor]:
    return [x, weights, *(factor for pair in factors for factor in pair if factor is not None)]


@st.composite
def any_shape(draw: st.DrawFn) -> Shape:
    """Factors that fit, cut or pad an up to 24 × 24 layer, independently in both directions."""
    side = st.integers(1, 7)
    m_a, n_a, m_b, n_b = draw(side), draw(side), draw(side), draw(side)
    return Shape(m_a, m_a, m_b, n_b, identity=True) if draw(st.booleans()) else Shape(m_a, n_a, m_b, n_b)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shapes = draw(st.lists(any_shape(), min_size=1, max_size=4))
    if draw(st.booleans()):  # equal shapes take a common path
        shapes.append(shapes[0])
    sizes = st.integers(1, 24)
    m, n = draw(sizes), draw(sizes)
    if draw(st.booleans()):  # the exact fit, which few random sizes hit
        m, n = shapes[0].rows, shapes[0].cols
    leading = draw(st.sampled_from([(), (1,), (5,), (0,), (2, 3), (2, 0), (1, 2, 2)]))
    return Case(m, n, tuple(shapes), leading, draw(st.integers(0, 2**31)))


@settings(max_examples=300, deadline=None)
@given(case=cases())
def test_product_and_gradients_equal_those_of_the_cut_kronecker_product(case: Case) -> None:
    x, weights, factors = tensors(case)
    delta = reference_delta(weights, factors, case.shapes, case.m, case.n)
    torch.testing.assert_close(delta_weight(weights, *pack(factors), case.shapes, case.m, case.n), delta)
    expected = x @ delta.mT
    probe = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    gradients = torch.autograd.grad((expected * probe).sum(), leaves(x, weights, factors))
    for backend in (b for b in BACKENDS if b != "thin"):  # see test_thin.py
        out = kronecker_linear(x, weights, *pack(factors), case.shapes, case.m, backend)
        torch.testing.assert_close(out, expected)
        found = torch.autograd.grad((out * probe).sum(), leaves(x, weights, factors))
        for name, ours, theirs in zip(["x", "weights", *["factor"] * 99], found, gradients, strict=False):
            torch.testing.assert_close(ours, theirs, msg=lambda m, n=name, b=backend: f"{b}, {n}: {m}")


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_lora_factors_multiply_to_the_cut_kronecker_product(case: Case) -> None:
    _, weights, factors = tensors(case)
    lora_a, lora_b = lora_factors(weights, *pack(factors), case.shapes, case.m, case.n)
    rank = exact_rank(case.shapes, case.m, case.n)
    assert (lora_a.shape, lora_b.shape) == ((rank, case.n), (case.m, rank))
    expected = reference_delta(weights, factors, case.shapes, case.m, case.n)
    torch.testing.assert_close(lora_b @ lora_a, expected)
    assert torch.linalg.matrix_rank(expected) <= rank


@settings(max_examples=100, deadline=None)
@given(
    m=st.integers(1, 80),
    n=st.integers(1, 80),
    components=st.integers(1, 3),
    rank=st.integers(1, 20),
    seed=st.integers(0, 2**31),
)
def test_servable_components_have_exactly_their_rank(
    m: int, n: int, components: int, rank: int, seed: int
) -> None:
    assume(components * rank <= min(m, n))  # also where the last blocks of rows and columns are partial
    shapes = filter_shapes("servable", components, m, n, rank)
    _, weights, factors = tensors(Case(m, n, shapes, (1,), seed))
    delta = reference_delta(weights.detach().sign(), factors, shapes, m, n)
    assert torch.linalg.matrix_rank(delta) == exact_rank(shapes, m, n) == components * rank


SOME_CASES = {
    "exact": Case(6, 8, (Shape(2, 4, 3, 2),), (3,), 0),
    "prime sizes": Case(7, 11, (Shape(3, 4, 3, 3), Shape(2, 2, 4, 6)), (2, 2), 1),
    "pads": Case(9, 10, (Shape(2, 2, 3, 3), Shape(3, 1, 2, 5)), (2,), 2),
    "cuts": Case(4, 5, (Shape(3, 3, 3, 3), Shape(2, 3, 4, 5)), (), 3),
    "identity": Case(7, 7, (Shape(4, 4, 2, 2, True), Shape(3, 3, 3, 3, True)), (2,), 4),
    "identity, m != n": Case(5, 12, (Shape(5, 5, 1, 3, True), Shape(2, 3, 2, 4)), (2,), 5),
    "equal shapes": Case(6, 6, (Shape(2, 3, 3, 2),) * 3, (2,), 6),
}


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("case", SOME_CASES.values(), ids=SOME_CASES)
def test_gradcheck(case: Case, backend: str) -> None:
    x, weights, factors = tensors(case)
    flat = [factor for pair in factors for factor in pair]

    def product(x: Tensor, weights: Tensor, *flat: Tensor | None) -> Tensor:
        pairs = list(zip(flat[::2], flat[1::2], strict=True))
        return kronecker_linear(x, weights, *pack(pairs), case.shapes, case.m, backend)

    assert torch.autograd.gradcheck(product, (x, weights, *flat))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("case", SOME_CASES.values(), ids=SOME_CASES)
def test_projecting_pulls_any_matrix_back(case: Case, transposed: bool) -> None:
    _, weights, factors = tensors(case)
    generator = torch.Generator().manual_seed(9)
    d = torch.randn(case.n, case.m, generator=generator, dtype=torch.float64).mT
    delta = reference_delta(weights, factors, case.shapes, case.m, case.n)
    expected = torch.autograd.grad((delta * d).sum(), leaves(weights, weights, factors)[1:])
    with torch.no_grad():
        grad = d if transposed else d.contiguous()
        left, right, grad_weights = project(grad, *pack(factors), weights, tuple(case.shapes))
    pairs = unpack(left, right, tuple(case.shapes))
    found = [grad_weights, *(g for pair in pairs for g in pair if g is not None)]
    torch.testing.assert_close(found, list(expected))


@pytest.mark.parametrize("backend", PLAIN)
def test_input_and_incoming_gradient_need_not_be_contiguous(backend: str) -> None:
    case = SOME_CASES["prime sizes"]
    x, weights, factors = tensors(case)
    strided = x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    assert not strided.is_contiguous()
    out = kronecker_linear(strided, weights, *pack(factors), case.shapes, case.m, backend)
    delta = reference_delta(weights, factors, case.shapes, case.m, case.n)
    torch.testing.assert_close(out, x @ delta.mT)
    (grad,) = torch.autograd.grad(out.sum(), strided)  # sum() hands down an expanded gradient
    torch.testing.assert_close(grad, delta.sum(0).expand_as(grad))


@pytest.mark.parametrize("backend", PLAIN)
def test_input_without_gradient_gets_none_and_the_factors_theirs(backend: str) -> None:
    case = SOME_CASES["identity, m != n"]
    x, weights, factors = tensors(case)
    kronecker_linear(x.detach(), weights, *pack(factors), case.shapes, case.m, backend).sum().backward()
    assert x.grad is None
    for leaf in leaves(x, weights, factors)[1:]:
        assert leaf.grad is not None
        assert leaf.grad.abs().max() > 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tokens_give_no_output_and_zero_gradients(backend: str) -> None:
    case = SOME_CASES["pads"]._replace(leading=(2, 0))
    x, weights, factors = tensors(case)
    out = kronecker_linear(x, weights, *pack(factors), case.shapes, case.m, backend)
    assert out.shape == (2, 0, case.m)
    out.sum().backward()
    for leaf in leaves(x, weights, factors):
        assert torch.equal(leaf.grad, torch.zeros_like(leaf))


def test_unknown_backend_is_refused_by_name() -> None:
    x, weights, factors = tensors(SOME_CASES["exact"])
    with pytest.raises(ConfigError, match=r"'magic'.*auto, structured, dense, thin, fused"):
        kronecker_linear(x, weights, *pack(factors), SOME_CASES["exact"].shapes, 6, "magic")


@pytest.mark.parametrize(
    ("m", "n", "tokens", "faster"),  # as measured, see pick_backend
    [
        (4096, 4096, 32, "structured"),
        (4096, 4096, 1024, "structured"),
        (1024, 4096, 512, "structured"),
        (1024, 4096, 2048, "dense"),
        (2048, 2048, 512, "structured"),
        (576, 576, 8, "structured"),
        (576, 576, 128, "structured"),
        (576, 576, 512, "dense"),
        (192, 576, 32, "structured"),
        (192, 576, 64, "dense"),
        (192, 576, 256, "dense"),
    ],
)
def test_auto_takes_what_was_measured_to_be_faster(m: int, n: int, tokens: int, faster: str) -> None:
    assert pick_backend(tokens, filter_shapes("diverse", 10, m, n), m, n) == faster


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize(
    ("m", "n", "filters", "components"),
    [(64, 64, "diverse", 10), (96, 40, "diverse", 5), (128, 64, "prime", 4), (61, 67, "square", 1)],
)
def test_bf16_error_is_no_larger_than_that_of_a_bf16_matmul(
    m: int, n: int, filters: str, components: int, backend: str
) -> None:
    shapes = filter_shapes(filters, components, m, n)
    x, weights, factors = tensors(Case(m, n, shapes, (16,), 5), torch.float32)
    with torch.no_grad():
        x = x.bfloat16()
        delta = reference_delta(
            weights.double(),
            [(None if a is None else a.double(), b.double()) for a, b in factors],
            shapes,
            m,
            n,
        )
        exact = x.double() @ delta.mT
        matmul = (x @ delta.bfloat16().mT).double()
        out = kronecker_linear(x, weights, *pack(factors), shapes, m, backend)
    assert out.dtype == torch.bfloat16
    # The dense backend is the same matmul but for the last bit of a few entries of ΔW.
    assert 0 < (out.double() - exact).norm() <= 1.01 * (matmul - exact).norm()


@pytest.mark.parametrize("backend", PLAIN)
def test_bf16_gradients_have_their_leaves_dtype_and_are_near_the_exact_ones(backend: str) -> None:
    shapes = filter_shapes("diverse", 5, 48, 40)
    x, weights, factors = tensors(Case(48, 40, shapes, (32,), 6), torch.float32)
    low = x.detach().bfloat16().requires_grad_()
    kronecker_linear(low, weights, *pack(factors), shapes, 48, backend).square().sum().backward()
    found = [leaf.grad for leaf in leaves(low, weights, factors)]
    exact = (low.detach().float().requires_grad_(), weights, factors)
    out = exact[0] @ reference_delta(weights, factors, shapes, 48, 40).mT
    expected = torch.autograd.grad(out.square().sum(), leaves(*exact))
    for leaf, ours, theirs in zip(leaves(low, weights, factors), found, expected, strict=True):
        assert ours.dtype == leaf.dtype
        assert (ours.float() - theirs).norm() <= 0.03 * theirs.norm()


@pytest.mark.parametrize("backend", PLAIN)
def test_autocast_leaves_the_dtypes_alone(backend: str) -> None:
    shapes = filter_shapes("diverse", 5, 48, 40)
    x, weights, factors = tensors(Case(48, 40, shapes, (8,), 7), torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        plain = kronecker_linear(x.to(dtype), weights, *pack(factors), shapes, 48, backend)
        with torch.autocast("cpu", torch.bfloat16):
            under = kronecker_linear(x.to(dtype), weights, *pack(factors), shapes, 48, backend)
        assert under.dtype == dtype
        assert torch.equal(under, plain)


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("case", SOME_CASES.values(), ids=SOME_CASES)
def test_nothing_is_saved_but_input_weights_and_factors(case: Case, backend: str) -> None:
    case = case._replace(leading=(3, 13))
    x, weights, factors = tensors(case)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    left, right = (side.detach().requires_grad_() for side in pack(factors))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kronecker_linear(x, weights, left, right, case.shapes, case.m, backend)
    function = kronecker_linear(x, weights, left, right, case.shapes, case.m, backend).grad_fn

    def places(held: list[Tensor]) -> list[tuple[int, int, int]]:
        return sorted((t.data_ptr(), t.numel(), t.untyped_storage().nbytes()) for t in held)

    # Hooks, such as those of checkpointing, are given activations only.
    assert places(saved) == places([x])
    assert function is not None
    kept = function.next_functions[0][0].saved_tensors
    assert places(kept) == places([x, weights, left, right])


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_non_finite_input_shows_in_its_token_and_in_no_other(backend: str, bad: float) -> None:
    case = Case(6, 8, (Shape(2, 4, 3, 2), Shape(3, 2, 2, 4)), (4,), 0)
    x, weights, factors = tensors(case)
    with torch.no_grad():
        x[2, 3] = bad
    out = kronecker_linear(x, weights, *pack(factors), case.shapes, case.m, backend)
    assert out.isfinite().all(1).tolist() == [True, True, False, True]
    assert not out[2].isfinite().any()
    out.sum().backward()
    assert not factors[0][0].grad.isfinite().all()
    assert not weights.grad.isfinite().any()


@pytest.mark.parametrize("backend", PLAIN)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_a_non_finite_factor_shows_in_every_token(backend: str, bad: float, side: int) -> None:
    case = Case(6, 8, (Shape(2, 4, 3, 2), Shape(3, 2, 2, 4)), (4,), 0)
    x, weights, factors = tensors(case)
    with torch.no_grad():
        factors[1][side][1, 1] = bad
    out = kronecker_linear(x, weights, *pack(factors), case.shapes, case.m, backend)
    assert not out.isfinite().all(1).any()
    assert not delta_weight(weights, *pack(factors), case.shapes, 6, 8).isfinite().all()
