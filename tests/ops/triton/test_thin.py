"""The kernels of thin products, under Triton's interpreter where there is no GPU (see shared/fixtures)."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moka_pl.adapters.filters import filter_shapes
from moka_pl.backbone.quantization import dense_weight, kernel_weight, quantised_linear
from moka_pl.ops.gating import Gating, gates_of
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, left_sizes, right_sizes
from moka_pl.ops.merged_forward import MergedForward
from moka_pl.ops.operators import number_layer
from moka_pl.ops.thin import down, hidden_size, lora_left, lora_right

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")

DEVICE = torch.device("cpu")
SCALING = 1.7

#: Shapes, m, n, tokens, gating.
CASES = {
    "sums taken early": ((Shape(4, 16, 16, 4),), 64, 64, 32, "softmax"),
    "two components": ((Shape(4, 32, 16, 4),) * 2, 64, 128, 40, "softmax"),
    "padded ranks": ((Shape(2, 33, 40, 2),), 80, 66, 37, "sigmoid"),
    "several shapes, cut and filled": ((Shape(3, 7, 9, 5), Shape(2, 9, 20, 3)), 30, 43, 17, "softmax"),
    "odd ranks": ((Shape(7, 5, 5, 1),) * 3, 33, 5, 70, "sigmoid"),
    "many hidden numbers, ungated": ((Shape(8, 16, 16, 8), Shape(1, 128, 128, 1)), 128, 128, 33, None),
}


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.detach()).norm() / exact.detach().norm())


def _updates(
    shapes: tuple[Shape, ...], m: int, n: int, gating: Gating, layer: nn.Linear | None = None
) -> kernels.FusedThinUpdates:
    frozen = None if layer is None else lambda x: nn.functional.linear(x, dense_weight(layer))
    weight = None if layer is None else lambda: dense_weight(layer)
    source = None if layer is None else lambda: kernel_weight(layer, torch.float32, even=True)
    return kernels.FusedThinUpdates(
        shapes, m, n, SCALING, weight, True, gating, frozen,
        plan=kernels.make_thin_plan(shapes, m, n, DEVICE), source=source,
    )  # fmt: skip


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> tuple[tuple[Shape, ...], int, int, int, Gating | None]:
    torch.manual_seed(len(request.param))
    return CASES[request.param]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_and_all_gradients_agree_with_float64(case, dtype: torch.dtype) -> None:
    shapes, m, n, tokens, gating = case
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    gate = None if gating is None else torch.randn(len(shapes))
    x, upstream = torch.randn(tokens, n).to(dtype), torch.randn(tokens, m).to(dtype)
    own = [p.requires_grad_() for p in (x, left, right, gate) if p is not None]
    updates = _updates(shapes, m, n, gating or "none")
    out = MergedForward.apply(x, gate, left, right, None, updates, True)
    found = torch.autograd.grad(out, own, upstream)

    exact = [p.detach().double().requires_grad_() for p in own]
    alpha = torch.full((len(shapes),), 1 / len(shapes)) if gating is None else gates_of(exact[3], gating)
    target = exact[0] @ delta_weight(alpha.double() * SCALING, exact[1], exact[2], shapes, m, n).mT
    expected = torch.autograd.grad(target, exact, upstream.double())
    bound = 2e-2 if dtype is torch.bfloat16 else 1e-5  # the interpreter cuts bfloat16 off
    assert _error(out, target) < bound
    for value, reference in zip(found[:3], expected[:3], strict=True):
        assert _error(value, reference) < bound
    if gating == "softmax" and len(shapes) == 1:
        assert found[3].tolist() == [0.0]
    elif gating is not None:
        assert _error(found[3], expected[3]) < bound


def test_thin_matrices_are_their_references(case) -> None:
    shapes, m, n, *_ = case
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    weights = torch.randn(len(shapes))
    plan = kernels.make_thin_plan(shapes, m, n, DEVICE)
    thin, weight = kernels.thin_matrices(plan, left, right, kernels.Gates(weights), torch.float32)
    size = hidden_size(shapes)
    assert weight is None
    assert torch.equal(thin[: size * n].view(size, n), lora_left(left, shapes, n, thin.dtype))
    assert torch.equal(thin[size * n :].view(size, m).mT, lora_right(right, weights, shapes, m, thin.dtype))


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize(("m", "n"), [(64, 128), (40, 24)])
def test_a_4bit_weight_is_dequantised_as_bitsandbytes_does(m: int, n: int, nested: bool) -> None:
    torch.manual_seed(0)
    layer = quantised_linear(nn.Linear(n, m), torch.randn(m, n) / 50, "nf4", nested, torch.float32)
    shapes = filter_shapes([[2, -(-n // 2), -(-m // 2), 2]], 1, m, n)
    plan = kernels.make_thin_plan(shapes, m, n, DEVICE)
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    source = kernel_weight(layer, torch.float32, even=True)
    assert kernels.can_dequantise(source, m * n)
    _, found = kernels.thin_matrices(plan, left, right, kernels.Gates(torch.ones(1)), torch.float32, source)
    assert torch.equal(found, dense_weight(layer))  # bit for bit


@pytest.mark.parametrize("case", ["padded ranks", "two components"], indirect=True)
def test_updates_add_themselves_to_products_of_the_frozen_layer(case) -> None:
    shapes, m, n, tokens, _ = case
    weight = torch.randn(m, n)
    updates = replace(
        _updates(shapes, m, n, "none"),
        base_weight=lambda: weight,
        frozen=lambda x: x @ weight.mT + 1,
        frozen_gradient=lambda grad: 2 * grad @ weight,  # the layer's own, whatever it is
    )
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    x = torch.randn(tokens, n, requires_grad=True)
    out = MergedForward.apply(x, None, left, right, None, updates, True)
    (found,) = torch.autograd.grad(out, x, upstream := torch.randn(tokens, m))
    delta = delta_weight(torch.full((len(shapes),), SCALING / len(shapes)), left, right, shapes, m, n)
    assert _error(out, x.detach().double() @ (weight + delta).double().mT + 1) < 1e-5
    assert _error(found, upstream.double() @ (2 * weight + delta).double()) < 1e-5


@pytest.mark.parametrize("own", [False, True])
def test_gradients_add_themselves_to_those_of_later_layers(own: bool) -> None:
    torch.manual_seed(0)
    (shapes, m, n, tokens, _), weight = CASES["two components"], torch.randn(CASES["two components"][1:3])
    updates = replace(
        _updates(shapes, m, n, "none"),
        base_weight=lambda: weight,
        frozen=lambda x: x @ weight.mT,
        frozen_gradient=(lambda grad: grad @ weight) if own else None,
    )
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    x, grad, kept = torch.randn(tokens, n), torch.randn(tokens, m), list[torch.Tensor]()
    updates.product(x, None, left, right, None, lambda *parts: kept.extend(parts))
    total, first = torch.randn(tokens, n), torch.randn(tokens, n)
    parts = grad, x, left, right, None, tuple(kept)
    alone, both = updates.backward(*parts, True), updates.backward(*parts, True, total.clone())
    assert _error(both[0], alone[0].double() + total) < 1e-5
    assert all(torch.equal(one, other) for one, other in zip(both[1:3], alone[1:3], strict=True))
    unneeded = updates.backward(*parts, False, first.clone())
    assert unneeded[0] is None
    assert torch.equal(unneeded[1], alone[1])


def test_the_frozen_product_adds_itself_to_the_update(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    m, n, tokens = 64, 128, 40
    monkeypatch.setattr("moka_pl.ops.triton.merged_forward.DEQUANTISED_TOKENS", tokens - 1)
    layer = quantised_linear(nn.Linear(n, m, bias=False), torch.randn(m, n), "nf4", True, torch.float32)
    shapes = (Shape(3, 64, 22, 2),)
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    x, upstream = torch.randn(tokens, n).requires_grad_(), torch.randn(tokens, m)
    updates = _updates(shapes, m, n, "none", layer)
    assert not updates.plan.merged  # it stands out of the layer
    kept = []
    out = updates.product(x.detach(), None, left, right, None, lambda *parts: kept.extend(parts))
    total = dense_weight(layer).double() + SCALING * delta_weight(
        torch.ones(1).double(), left.double(), right.double(), shapes, m, n
    )
    assert _error(out, x.detach().double() @ total.mT) < 1e-5
    assert _error(kept[0], down(x.detach().double(), left.double(), shapes)) < 1e-5
    grad_x, *_ = updates.backward(upstream, x.detach(), left, right, None, tuple(kept), True)
    assert _error(grad_x, upstream.double() @ total) < 1e-5
    grad_x, grad_left, _, _ = updates.backward(upstream, x.detach(), left, right, None, tuple(kept), False)
    assert grad_x is None
    assert grad_left.isfinite().all()


#: Shape and number of components that are added to W, m, n and gating.
MERGED = {
    "servable filters": (Shape(4, 32, 16, 4), 1, 64, 128, "softmax"),
    "three components": (Shape(2, 32, 20, 2), 3, 40, 64, "softmax"),
    "words with one left entry": (Shape(8, 8, 3, 8), 2, 24, 64, "none"),
    "a single row of left factors": (Shape(1, 64, 7, 1), 2, 7, 64, "sigmoid"),
}


@pytest.fixture(params=MERGED, ids=str)
def merged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Updates that are added to a 4-bit W, W, factors and gate logits."""
    torch.manual_seed(len(request.param))
    shape, count, m, n, gating = MERGED[request.param]
    monkeypatch.setattr("moka_pl.ops.triton.merged_forward.DEQUANTISED_TOKENS", 8)
    layer = quantised_linear(nn.Linear(n, m, bias=False), torch.randn(m, n), "nf4", True, torch.float32)
    shapes = (shape,) * count
    updates = _updates(shapes, m, n, gating, layer)
    assert updates.plan.merged
    parts = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes))), torch.randn(count)
    return updates, dense_weight(layer), *parts


@pytest.mark.parametrize("biased", [False, True])
def test_a_layer_with_merged_components_is_one_product(merged, biased: bool) -> None:
    updates, weight, left, right, gate = merged
    m, n = weight.shape
    x, upstream, total = torch.randn(33, n), torch.randn(33, m), torch.randn(33, n)
    bias = torch.randn(m) if biased else None
    kept: list[torch.Tensor] = []
    out = updates.product(x, bias, left, right, gate, lambda *parts: kept.extend(parts))
    found = updates.backward(upstream, x, left, right, gate, (), True, total.clone())
    assert not kept

    exact = [part.double().requires_grad_() for part in (x, left, right, gate)]
    weights = gates_of(exact[3], updates.gating) * SCALING
    delta = delta_weight(weights, exact[1], exact[2], updates.shapes, m, n)
    target = exact[0] @ (weight.double() + delta).mT + (0 if bias is None else bias)
    expected = torch.autograd.grad(target, exact, upstream.double())
    assert _error(out, target) < 1e-5
    assert _error(found[0], expected[0] + total) < 1e-5
    for value, reference in zip(found[1:3], expected[1:3], strict=True):
        assert _error(value, reference) < 1e-5
    if len(updates.shapes) == 1:
        assert found[3].tolist() == [0.0]
    else:
        assert _error(found[3], expected[3]) < 1e-5
    unneeded = updates.backward(upstream, x, left, right, gate, (), False)
    assert unneeded[0] is None
    assert all(torch.equal(one, other) for one, other in zip(unneeded[1:], found[1:], strict=True))


@pytest.mark.parametrize("tokens", [8, 9])
def test_components_are_merged_where_tokens_are_many(merged, tokens: int) -> None:
    updates, weight, left, right, gate = merged
    kept: list[torch.Tensor] = []
    x = torch.randn(tokens, weight.shape[1])
    updates.product(x, None, left, right, gate, lambda *parts: kept.extend(parts))
    assert len(kept) == (tokens == 8)


class Layer:
    """A layer as operators ask it."""

    def __init__(self, updates: kernels.FusedThinUpdates) -> None:
        self.updates = updates

    def decode(self, x: Tensor) -> None:
        """Serves no tokens."""

    def updates_for(self, x: Tensor) -> tuple[kernels.FusedThinUpdates, None]:
        return self.updates, None


@pytest.mark.parametrize("tokens", [8, 9])  # thin products, and merged
def test_a_compiler_is_told_the_same_sizes_where_components_are_merged(merged, tokens: int) -> None:
    updates, weight, *parts = merged
    m, n = weight.shape
    layer = Layer(updates)
    own = [part.requires_grad_() for part in (torch.randn(tokens, n), *parts)]
    x, left, right, gate = own
    number = number_layer(layer)
    sizes = [int(size) for shape in updates.shapes for size in shape]
    hidden = hidden_size(updates.shapes)
    out, kept = torch.ops.moka_pl.product(x, gate, left, right, number, sizes, m, "thin", None, hidden, False)
    assert kept.shape == (tokens, hidden)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, own, upstream)
    plain = MergedForward.apply(x, gate, left, right, None, updates, True)
    expected = torch.autograd.grad(plain, own, upstream)
    assert torch.equal(out, plain)
    assert all(map(torch.equal, found, expected))


def test_merged_weights_are_their_reference(merged) -> None:
    updates, weight, left, right, gate = merged
    gates = kernels.Gates(gate, SCALING, updates.gating)
    found = kernels.merged_weight(updates.plan, left, right, gates, torch.float32, updates.source())
    weights = gates_of(gate, updates.gating) * SCALING
    expected = weight + delta_weight(weights, left, right, updates.shapes, *weight.shape)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-6)
    zeros = torch.zeros_like(right)
    unchanged = kernels.merged_weight(updates.plan, left, zeros, gates, torch.float32, updates.source())
    assert torch.equal(unchanged, weight)


@pytest.mark.parametrize(
    ("shapes", "m", "n"),
    [
        ((Shape(4, 32, 16, 4),), 60, 128),  # cut
        ((Shape(4, 32, 16, 4),), 64, 136),  # filled up
        ((Shape(4, 31, 16, 4),), 64, 124),  # rows that are no whole words
        ((Shape(3, 32, 16, 4),), 48, 128),  # no power of two
        ((Shape(4, 8, 16, 16),), 64, 128),  # a word meets a part of the right entries
        ((Shape(4, 32, 16, 4), Shape(2, 64, 32, 2)), 64, 128),
        ((Shape(4, 32, 16, 4),) * 5, 64, 128),
    ],
    ids=str,
)
def test_other_components_are_not_merged(shapes: tuple[Shape, ...], m: int, n: int) -> None:
    assert not kernels.make_thin_plan(shapes, m, n, DEVICE).merged


def test_programs_may_take_several_tiles_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes, m, n, *_ = CASES["several shapes, cut and filled"]
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    x, upstream = torch.randn(150, n), torch.randn(150, m)
    runs = []
    for blocks in (64, 2):
        monkeypatch.setattr("moka_pl.ops.triton.thin.plan._BLOCKS", blocks)
        plan = kernels.ThinPlan(shapes, m, n, DEVICE)
        assert (plan.grids(150, x.itemsize).times > 1) == (blocks == 2)
        updates = replace(_updates(shapes, m, n, "none"), plan=plan)
        kept: list[torch.Tensor] = []
        updates.product(x, None, left, right, None, lambda *parts, to=kept: to.extend(parts))
        runs.append(updates.backward(upstream, x, left, right, None, tuple(kept), True)[:3])
    for found, expected in zip(*runs, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_no_tokens_give_no_output_and_zero_gradients() -> None:
    shapes, m, n, _, _ = CASES["two components"]
    left, right = torch.randn(sum(left_sizes(shapes))), torch.randn(sum(right_sizes(shapes)))
    updates = _updates(shapes, m, n, "none")
    kept = []
    out = updates.product(torch.empty(0, n), None, left, right, None, lambda *parts: kept.extend(parts))
    assert out.shape == (0, m)
    _, grad_left, grad_right, _ = updates.backward(
        torch.empty(0, m), torch.empty(0, n), left, right, None, tuple(kept), True
    )
    assert not grad_left.any()
    assert not grad_right.any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_show(bad: float) -> None:
    shapes, m, n, tokens, _ = CASES["sums taken early"]
    left, right = torch.ones(sum(left_sizes(shapes))), torch.ones(sum(right_sizes(shapes)))
    updates = _updates(shapes, m, n, "none")
    x = torch.ones(tokens, n)
    x[3, 5] = bad
    kept = []
    out = updates.product(x, None, left, right, None, lambda *parts: kept.extend(parts))
    assert not out[3].isfinite().any()
    grads = updates.backward(torch.ones(tokens, m), x, left, right, None, tuple(kept), True)
    assert not grads[1].isfinite().all()
    assert not grads[2].isfinite().all()
