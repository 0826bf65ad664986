"""Frozen 4-bit layers that multiply in 8-bit floats; run with ``pytest -m gpu`` on Ada, Hopper or newer."""

import pytest
import torch
from torch import Tensor, nn

from moka_pl.adapters import MokaConfig, MokaLinear, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.products.float8 import keep_scales, missing_for_float8
from moka_pl.backbone.products.frozen import fuse_products
from moka_pl.backbone.quantization import dense_weight, kernel_weight, quantised_linear
from moka_pl.lm.checkpointing import checkpoint_layers
from moka_pl.ops.triton.float8 import scale_rows, scale_weight
from moka_pl.ops.triton.float8.operands import WeightScales, reference_rows, reference_weight

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _products() -> None:
    if (missing := missing_for_float8(CUDA)) is not None:
        pytest.skip(f"needs {missing}")


pytestmark = pytest.mark.gpu

SIZES = [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (192, 576), (1008, 1040)]


def _layer(m: int, n: int, kind: str = "nf4", bias: bool = False, float8: bool = True) -> nn.Module:
    torch.manual_seed(m + n)
    weight = torch.randn(m, n, device=CUDA).bfloat16() / 50
    layer = quantised_linear(nn.Linear(n, m, bias=bias, device=CUDA), weight, kind, True, torch.bfloat16)
    if float8:
        keep_scales(layer)
    fuse_products(layer)
    return layer.requires_grad_(False).train()


def _error(found: Tensor, exact: Tensor) -> float:
    return float((found.detach().double() - exact.double()).norm() / exact.double().norm())


def _differing(found: Tensor, expected: Tensor) -> float:
    return float((found.view(torch.uint8) != expected.view(torch.uint8)).float().mean())


@pytest.mark.parametrize("n", [4096, 11008, 28672, 576, 83])
def test_rows_are_those_of_the_reference(n: int) -> None:
    x = torch.randn(301, n, device=CUDA).bfloat16()
    x[1], x[2], x[3, 0] = 0, x[2] * 1e-6, 1000
    found, expected = scale_rows(x), reference_rows(x)
    assert torch.equal(found.scales, expected.scales)
    assert _differing(found.numbers, expected.numbers) < 5e-3  # PyTorch divides by multiplying
    x[4, 5], x[5, 5] = torch.nan, torch.inf
    whole = scale_rows(x)
    whole = whole.numbers.float() * whole.scales
    assert whole[4:6].sum(1).isnan().all()
    assert whole[6:].isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_weights_are_those_of_the_reference(m: int, n: int, kind: str, transposed: bool) -> None:
    layer = _layer(m, n, kind)
    weight = dense_weight(layer).float()
    scales = WeightScales.of(weight)
    source = kernel_weight(layer, torch.bfloat16, even=True, exact=False)
    found = scale_weight(source, scales, transposed)
    oriented = weight.mT.contiguous() if transposed else weight
    expected = reference_weight(oriented, scales.by_columns if transposed else scales.by_rows)
    assert _differing(found.numbers, expected) < 0.04  # of which W was rounded to 16 bits first
    assert _error(found.numbers.float() * found.scales, oriented) < 0.03


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tokens", [1, 7, 2000])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_layers_agree_with_float64_up_to_rounding(m: int, n: int, tokens: int, bias: bool) -> None:
    layer = _layer(m, n, bias=bias)
    if bias:
        layer.bias.normal_()
    x = torch.randn(1, tokens, n, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(1, tokens, m, device=CUDA, dtype=torch.bfloat16)
    runs = [(out := layer(x), *torch.autograd.grad(out, x, upstream)) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    weight = dense_weight(layer).double()
    exact = x.detach().double() @ weight.mT + (layer.bias.double() if bias else 0)
    assert 0.01 < _error(runs[0][0], exact) < 0.05
    assert 0.02 < _error(runs[0][1], upstream.double() @ weight) < 0.05
    plain = layer.eval()(x)
    assert _error(plain, exact) < 5e-3
    if not bias:
        assert torch.equal(plain, _layer(m, n, float8=False)(x))


@pytest.mark.parametrize(("m", "n"), SIZES[:4])
def test_thin_updates_are_added_to_both_products(m: int, n: int) -> None:
    config = MokaConfig(filters="servable", rank=16, components=1)
    layer = MokaLinear(_layer(m, n), config)
    with torch.no_grad():
        layer.moka_B.normal_(std=0.05)
    x = torch.randn(2000, n, device=CUDA, dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(2000, m, device=CUDA, dtype=torch.bfloat16)
    wanted = [x, layer.moka_A, layer.moka_B]
    found = [out := layer.train()(x), *torch.autograd.grad(out, wanted, upstream)]
    plain = [out := layer.eval()(x), *torch.autograd.grad(out, wanted, upstream)]
    assert 0.005 < _error(found[0], plain[0]) < 0.05
    assert 0.005 < _error(found[1], plain[1]) < 0.05
    for eight, sixteen in zip(found[2:], plain[2:], strict=True):  # which the frozen products have no part in
        assert _error(eight, sixteen) < 1e-5


def _model(**options: str) -> nn.Module:
    model = load_backbone(BackboneConfig("smollm2-135m", weights="random", **options), CUDA).model
    torch.manual_seed(0)
    inject_adapter(model, MokaConfig(filters="servable", rank=4, components=1, target_modules="all-linear"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "moka_B" in name:
                parameter.normal_(std=1e-3)
    return model.train()


def _gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    trained = [p for p in model.parameters() if p.requires_grad]
    return list(torch.autograd.grad(model(ids, labels=ids).loss, trained))


@pytest.mark.parametrize("offload", [None, False, True])
def test_a_step_of_a_model_is_the_same_with_checkpointing(offload: bool | None) -> None:
    ids = torch.randint(200, (8, 256), device=CUDA)
    model = _model(matmul="fp8")
    gradients = _gradients(model, ids)
    if offload is not None:
        checkpoint_layers(model, offload)
        again = _gradients(model, ids)
        # PyTorch's attention adds up in no fixed order.
        assert max(_error(a, b) for a, b in zip(again, gradients, strict=True)) < 0.05
        return
    near = _gradients(_model(), ids)
    # The gate of a single component has no gradient.
    pairs = [pair for pair in zip(gradients, near, strict=True) if pair[1].any()]
    assert len(pairs) > len(near) / 2
    angles = [nn.functional.cosine_similarity(a.flatten(), b.flatten(), 0) for a, b in pairs]
    assert 0.8 < torch.stack(angles).mean() < 1


def test_a_captured_step_is_the_step_itself() -> None:
    """Inputs that several layers share are made again at every replay."""
    query, value = _layer(4096, 4096), _layer(1024, 4096)
    x = torch.randn(2000, 4096, device=CUDA, dtype=torch.bfloat16, requires_grad=True)

    def step() -> list[Tensor]:
        read = x * 2
        outs = [query(read), value(read)]
        return [*outs, *torch.autograd.grad(sum(out.float().square().sum() for out in outs), x)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))
