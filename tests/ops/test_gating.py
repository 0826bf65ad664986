"""The gates against their formulas, and sigmoid gates through every backend against torch.kron."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.ops.gating import gates_of, logits_gradient, normalised_entropy
from moka_pl.ops.merged_forward import DenseUpdates, MergedForward

M, N, R = 12, 20, 3
# A shape twice, and one that stands out of the layer to be cut.
SHAPES = [[3, 5, 4, 4], [3, 5, 4, 4], [2, 3, 7, 8]]


def test_sigmoid_gates_start_at_one_rth_and_go_from_0_to_2_rths() -> None:
    assert gates_of(torch.zeros(2, 4), "sigmoid").tolist() == [[0.25] * 4] * 2
    found = gates_of(torch.tensor([-200.0, 0.3, 200.0, 0.0]), "sigmoid")
    assert found.tolist() == pytest.approx([0, 0.5 / (1 + math.exp(-0.3)), 0.5, 0.25])
    assert gates_of(torch.zeros(2, 4), "softmax").tolist() == [[0.25] * 4] * 2


@settings(max_examples=50, deadline=None)
@given(
    logits=st.lists(st.floats(-8, 8), min_size=1, max_size=12), gating=st.sampled_from(["softmax", "sigmoid"])
)
def test_gradients_of_the_logits_are_those_of_autograd(logits: list[float], gating) -> None:
    g = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    upstream = torch.linspace(-1, 2, len(g), dtype=torch.float64)
    alpha = gates_of(g, gating)
    (expected,) = torch.autograd.grad(alpha, g, upstream)
    torch.testing.assert_close(logits_gradient(alpha.detach(), upstream, gating), expected)


def test_entropy_is_that_of_the_shares() -> None:
    gates = torch.tensor([[0.25] * 4, [1.0, 0, 0, 0], [0.5, 0.5, 0, 0]])
    for scale in (1, 0.01, 1.9):
        assert normalised_entropy(gates * scale).tolist() == pytest.approx([1, 0, 0.5])
    assert normalised_entropy(torch.zeros(1, 4)).tolist() == [0]  # all closed
    assert normalised_entropy(torch.ones(2, 1)).tolist() == [1, 1]


def adapted(backend: str, gating: str, filters, dtype: torch.dtype) -> MokaLinear:
    torch.manual_seed(0)
    base = nn.Linear(N, M, dtype=dtype).requires_grad_(False)
    config = MokaConfig(components=R, gating=gating, filters=filters, scaling=1.7, backend=backend)
    layer = MokaLinear(base, config, dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.startswith("moka_"):
                parameter.normal_(std=1.0 if name == "moka_gate" else 0.5)
    return layer


def by_kron(layer: MokaLinear, leaves: dict[str, Tensor]) -> Tensor:
    """``(W + s Σ α_i kron(A_i, B_i)) x + bias`` from the formula alone."""
    g = leaves["moka_gate"]
    alpha = {
        "sigmoid": [2 / R / (1 + torch.exp(-g[i])) for i in range(R)],
        "softmax": [g[i].exp() / g.exp().sum() for i in range(R)],
    }[layer.gating]
    total = layer.base_layer.weight.double()
    left = right = 0
    for weight, shape in zip(alpha, layer.shapes, strict=True):
        if shape.identity:
            a = torch.eye(shape.m_a, shape.n_a, dtype=torch.float64)
        else:
            a = leaves["moka_A"][left : left + shape.m_a * shape.n_a].view(shape.m_a, shape.n_a)
            left += a.numel()
        b = leaves["moka_B"][right : right + shape.m_b * shape.n_b].view(shape.m_b, shape.n_b)
        right += b.numel()
        whole = torch.kron(a, b)[:M, :N]
        whole = nn.functional.pad(whole, (0, N - whole.shape[1], 0, M - whole.shape[0]))
        total = total + 1.7 * weight * whole
    return leaves["x"] @ total.mT + layer.base_layer.bias.double()


# By the product beside the layer, merged with it, and by the kernels, which compute in float32.
BACKENDS = {
    "structured": ("structured", torch.float64, 1e-10),
    "dense": ("dense", torch.float64, 1e-10),
    "fused": ("fused", torch.float32, 2e-5),
}


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("filters", [SHAPES, "prime", "diverse"], ids=str)
@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
@pytest.mark.parametrize("case", BACKENDS.values(), ids=BACKENDS)
def test_every_backend_gives_the_values_and_gradients_of_torch_kron(case, gating, filters, merged) -> None:
    backend, dtype, bound = case
    if backend == "fused":
        pytest.importorskip("triton")
    layer = adapted(backend, gating, filters, dtype)
    if not merged:  # who listens to the frozen layer makes it run by itself
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(2, 9, N, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()
    leaves = {"x": x} | {name: p for name, p in layer.named_parameters() if name.startswith("moka_")}
    upstream = torch.randn(2, 9, M, generator=torch.Generator().manual_seed(2), dtype=dtype)
    out = layer(x)
    found = torch.autograd.grad(out, list(leaves.values()), upstream)

    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    target = by_kron(layer, exact)
    expected = torch.autograd.grad(target, list(exact.values()), upstream.double())
    assert exact["moka_gate"].abs().min() > 0.01
    for name, ours, theirs in zip(("y", *leaves), (out, *found), (target, *expected), strict=True):
        assert theirs.norm() > 0.1
        assert (ours.double() - theirs).norm() < bound * theirs.norm(), name
    delta = layer.get_delta_weight().double() @ torch.eye(N).double()
    torch.testing.assert_close(
        (delta + layer.base_layer.weight.double()) @ x[0, 0].double() + layer.base_layer.bias.double(),
        target[0, 0],
        atol=1e-5,
        rtol=1e-5,
    )


@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
def test_the_merged_forward_passes_gradcheck(gating) -> None:
    layer = adapted("dense", gating, SHAPES, torch.float64)
    base_weight = layer.base_layer.weight.detach
    updates = DenseUpdates(layer.shapes, *layer.base_layer.weight.shape, 1.3, base_weight, False, gating)
    x = torch.randn(2, N, dtype=torch.float64, requires_grad=True)
    leaves = (x, layer.moka_gate, layer.moka_A, layer.moka_B)
    assert torch.autograd.gradcheck(lambda *leaves: MergedForward.apply(*leaves, None, updates, True), leaves)


@pytest.mark.parametrize("gating", ["sigmoid", "softmax"])
def test_decoding_without_gradients(gating, monkeypatch) -> None:
    pytest.importorskip("triton")
    import moka_pl.ops.triton

    calls = []
    original = moka_pl.ops.triton.add_decode_update_
    monkeypatch.setattr(
        moka_pl.ops.triton, "add_decode_update_", lambda *args: calls.append(1) or original(*args)
    )
    layer = adapted("fused", gating, SHAPES, torch.float32)
    x = torch.randn(3, N)
    with torch.no_grad():
        found = layer(x)
    assert calls
    exact = {name: p.detach().double() for name, p in layer.named_parameters()} | {"x": x.double()}
    torch.testing.assert_close(found.double(), by_kron(layer, exact), atol=1e-5, rtol=1e-5)


def test_a_sigmoid_layer_starts_as_an_ungated_one_does() -> None:
    layer = MokaLinear(nn.Linear(N, M), MokaConfig(components=R, gating="sigmoid"))
    assert layer.gates().tolist() == pytest.approx([1 / R] * R)
    assert "gating=sigmoid" in layer.extra_repr()
    torch.testing.assert_close(layer(torch.ones(1, N)), layer.base_layer(torch.ones(1, N)))
