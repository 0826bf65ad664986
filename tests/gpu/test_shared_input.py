"""Layers that read one tensor on a CUDA device; run with ``pytest -m gpu``."""

import pytest
import torch
from torch import Tensor, nn

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.backbone.products.float8 import keep_scales, missing_for_float8
from moka_pl.backbone.products.frozen import fuse_products
from moka_pl.backbone.quantization import dense_weight, quantised_linear
from moka_pl.ops import shared_input
from moka_pl.ops.kronecker import delta_weight

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
TOKENS = 2048
CONFIGS: dict[str, MokaConfig | None] = {
    "frozen": None,
    "r10": MokaConfig(),
    "r2": MokaConfig(components=2),
    "servable": MokaConfig(filters="servable", rank=16, components=1),
}
#: Rows of the layers that read a tensor of so many numbers.
SIZES = {
    "7B's q, k, v": ((4096,) * 3, 4096),
    "7B's gate, up": ((11008,) * 2, 4096),
    "GQA": ((4096, 1024, 1024), 4096),
}


def _layers(size: str, kinds: tuple[str, ...], float8: bool = False, bias: bool = False) -> list[nn.Module]:
    """4-bit layers, every one of the next of some kinds, with factors of ordinary size."""
    torch.manual_seed(0)
    sizes, n = SIZES[size]
    layers: list[nn.Module] = []
    for place, m in enumerate(sizes):
        weight = torch.randn(m, n, device=CUDA).bfloat16() / 50
        plain = nn.Linear(n, m, bias=bias, device=CUDA)
        base = quantised_linear(plain, weight, "nf4", True, torch.bfloat16).requires_grad_(False)
        keep_scales(base) if float8 else None
        fuse_products(base)
        config = CONFIGS[kinds[place % len(kinds)]]
        layers.append(base if config is None else MokaLinear(base, config))
    with torch.no_grad():
        for layer in layers:
            for name, parameter in layer.named_parameters():
                parameter.normal_(std=0.02) if name in ("moka_B", "moka_gate") else None
    return layers


def _trained(layers: list[nn.Module]) -> list[Tensor]:
    return [p for layer in layers for p in layer.parameters() if p.requires_grad]


def _step(layers: list[nn.Module], source: Tensor, upstream: list[Tensor]) -> list[Tensor]:
    """Outputs and all gradients of layers that read what a differentiable operation has made."""
    x = source * 1
    outs = [layer(x) for layer in layers]
    return [*outs, *torch.autograd.grad(outs, [source, *_trained(layers)], upstream)]


def _numbers(layers: list[nn.Module]) -> tuple[Tensor, list[Tensor]]:
    n = layers[0].in_features
    x = torch.randn(1, TOKENS, n, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    return x, [torch.randn(1, TOKENS, layer.out_features, device=CUDA).bfloat16() for layer in layers]


def _alone(monkeypatch: pytest.MonkeyPatch, layers: list[nn.Module], *numbers: object) -> list[Tensor]:
    with monkeypatch.context() as patch:
        patch.setattr(shared_input, "devices", set())
        return _step(layers, *numbers)  # type: ignore[arg-type]


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.double()).norm() / exact.double().norm())


KINDS = [("frozen",), ("r10", "frozen"), ("r10",), ("servable",), ("r2",), ("frozen", "servable", "r10")]


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
@pytest.mark.parametrize("size", SIZES)
def test_gradients_agree_with_float64(
    size: str, kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = _layers(size, kinds)
    x, upstream = _numbers(layers)
    found = _step(layers, x, upstream)
    assert all(torch.equal(one, other) for one, other in zip(found, _step(layers, x, upstream), strict=True))
    exact = torch.zeros_like(x, dtype=torch.float64)
    for place, (layer, grad) in enumerate(zip(layers, upstream, strict=True)):
        weight = dense_weight(getattr(layer, "base_layer", layer)).double()
        if isinstance(layer, MokaLinear):
            parts = [p.detach().double() for p in (layer.gates() * layer.scaling, layer.moka_A, layer.moka_B)]
            weight = weight + delta_weight(*parts, layer.shapes, *weight.shape)
        assert _error(found[place], x.detach().double() @ weight.mT) < 1e-2
        exact += grad.double() @ weight
    assert _error(found[len(layers)], exact) < 1e-2
    expected = _alone(monkeypatch, layers, x, upstream)
    # Sums are rounded once, and no more often than autograd's.
    assert _error(found[len(layers)], exact) < 1.05 * _error(expected[len(layers)], exact)
    for one, other in zip(found[: len(layers)], expected, strict=False):
        assert torch.equal(one, other)
    for one, other in zip(found[len(layers) + 1 :], expected[len(layers) + 1 :], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kinds", [("frozen",), ("servable",), ("r10", "frozen")], ids="-".join)
@pytest.mark.parametrize("bias", [False, True])
def test_products_in_8_bits_share(
    kinds: tuple[str, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (missing := missing_for_float8(CUDA)) is not None:
        pytest.skip(f"needs {missing}")
    layers = _layers("GQA", kinds, float8=True, bias=bias)
    x, upstream = _numbers(layers)
    found, expected = _step(layers, x, upstream), _alone(monkeypatch, layers, x, upstream)
    for one, other in zip(found, expected, strict=True):
        if not other.any():  # the gradient of a single component's gate
            assert not one.any()
            continue
        assert _error(one, other) < 5e-3


@pytest.mark.parametrize("kinds", KINDS, ids="-".join)
def test_a_captured_step_is_the_step_itself(kinds: tuple[str, ...]) -> None:
    layers = _layers("GQA", kinds)
    x, upstream = _numbers(layers)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _step(layers, x, upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _step(layers, x, upstream)
    with torch.no_grad():
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    found = _step(layers, x, upstream)
    assert all(torch.equal(a, b) for a, b in zip(captured, found, strict=True))


@pytest.mark.parametrize("kinds", [("frozen",), ("r10", "frozen")], ids="-".join)
def test_no_kernel_adds_gradients_up(kinds: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    layers = _layers("7B's q, k, v", kinds)
    numbers = _numbers(layers)

    def count(step: object) -> int:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()  # type: ignore[operator]
            torch.cuda.synchronize()
        return sum("add" in event.name.lower() and "elementwise" in event.name for event in profile.events())

    _step(layers, *numbers)
    assert count(lambda: _alone(monkeypatch, layers, *numbers)) - count(lambda: _step(layers, *numbers)) == 2
