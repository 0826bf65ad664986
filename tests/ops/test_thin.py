"""The two thin products against ΔW in float64, and the layers that they serve."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moka_pl.ops import dispatch
from moka_pl.ops.dispatch import resolve_backend
from moka_pl.ops.gating import gates_of
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, left_sizes, right_sizes
from moka_pl.ops.merged_forward import MergedForward
from moka_pl.ops.thin import (
    ThinUpdates,
    add_up_,
    down,
    down_backward,
    hidden_size,
    is_thin,
    lora_left,
    lora_right,
    up_backward,
)


@st.composite
def problems(draw: st.DrawFn) -> tuple[int, int, int, tuple[Shape, ...]]:
    """m, n, T and shapes that fit, cut or pad the layer, some of them equal neighbours."""
    side = st.integers(1, 6)
    shapes = draw(st.lists(st.builds(Shape, side, side, side, side, st.just(False)), min_size=1, max_size=3))
    shapes += shapes[-1:] * draw(st.integers(0, 2))
    m, n = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    if draw(st.booleans()):  # the exact fit, which few random sizes hit
        m, n = shapes[0].rows, shapes[0].cols
    return m, n, draw(st.integers(0, 4)), tuple(shapes)


def tensors(m: int, n: int, tokens: int, shapes: tuple[Shape, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(m + n)
    sizes = {
        "x": (tokens, n),
        "left": (sum(left_sizes(shapes)),),
        "right": (sum(right_sizes(shapes)),),
        "weights": (len(shapes),),
    }
    return {
        name: torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for name, size in sizes.items()
    }


@settings(max_examples=80, deadline=None)
@given(problem=problems())
def test_both_products_and_their_gradients_are_those_of_the_dense_update(problem) -> None:
    m, n, tokens, shapes = problem
    x, left, right, weights = (exact := tensors(*problem)).values()
    base, probe = (torch.randn(tokens, size, dtype=torch.float64) for size in (m, m))
    expected = x @ delta_weight(weights, left, right, shapes, m, n).mT
    gradients = torch.autograd.grad(expected, list(exact.values()), probe)

    with torch.no_grad():
        # Factors may begin anywhere in what holds them.
        left, right = (torch.cat([t.new_ones(3), t])[3:] for t in (left, right))
        hidden = down(x, left, shapes)
        out = base.clone()
        add_up_(out, hidden, right, weights, shapes)
        grad_hidden, grad_right, grad_weights = up_backward(probe, hidden, right, weights, shapes)
        grad_x = torch.ones_like(x)
        grad_left = down_backward(x, grad_hidden, left, shapes, grad_x)
        without = down_backward(x, grad_hidden, left, shapes, None)
        lora = lora_right(right, weights, shapes, m, x.dtype) @ lora_left(left, shapes, n, x.dtype)
    assert hidden.shape == (tokens, hidden_size(shapes))
    torch.testing.assert_close(out - base, expected)
    torch.testing.assert_close((grad_x - 1, grad_left, grad_right, grad_weights), gradients)
    torch.testing.assert_close(without, grad_left)
    torch.testing.assert_close(x @ lora.mT, expected)


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("components", [1, 3])
def test_the_operation_is_its_formula_and_passes_gradcheck(components, gating) -> None:
    m, n, shapes = 7, 9, (Shape(1, 3, 6, 2), Shape(2, 5, 4, 2), Shape(2, 5, 4, 2))[:components]
    leaves = tensors(m, n, 3, shapes)
    weight, bias = torch.randn(m, n, dtype=torch.float64), torch.randn(m, dtype=torch.float64)
    updates = ThinUpdates(
        shapes, m, n, 1.3, lambda: weight, False, gating, lambda x: nn.functional.linear(x, weight, bias)
    )

    def product(x: Tensor, left: Tensor, right: Tensor, gate: Tensor) -> Tensor:
        return MergedForward.apply(x, gate, left, right, bias, updates, True)

    x, left, right, gate = leaves.values()
    delta = delta_weight(1.3 * gates_of(gate, gating), left, right, shapes, m, n)
    torch.testing.assert_close(product(*leaves.values()), nn.functional.linear(x, weight + delta, bias))
    assert torch.autograd.gradcheck(product, tuple(leaves.values()))


def test_thin_are_small_ranks_without_identities() -> None:
    servable, wide = Shape(4, 144, 144, 4), Shape(2, 72, 288, 8)
    assert is_thin((servable,), 576, 576)
    assert is_thin((servable, wide), 192, 576)
    assert is_thin((servable,) * 4, 192, 576)
    assert not is_thin((servable,) * 5, 192, 576)
    assert not is_thin((Shape(24, 24, 24, 24),), 576, 576)
    assert not is_thin((servable, Shape(2, 2, 288, 288, identity=True)), 576, 576)


def test_auto_takes_thin_products_for_thin_components_alone() -> None:
    x, thin, square = torch.zeros(64, 576), [Shape(4, 144, 144, 4)], [Shape(24, 24, 24, 24)]
    assert resolve_backend("auto", x, torch.float32, thin, 576) == "thin"
    assert resolve_backend("auto", x, torch.float32, square, 576) != "thin"
    assert resolve_backend("thin", x, torch.float64, thin, 576) == "thin"
    dispatch._warn_not_thin.cache_clear()
    with pytest.warns(UserWarning, match="thin needs components of small ranks"):
        assert resolve_backend("thin", x, torch.float32, square, 576) == "dense"
