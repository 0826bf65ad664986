"""Layers of quantised weights: product, gradient, and that nothing changes what is stored."""

import copy
import pickle

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.backbone.quantization import (
    QuantisedLinear,
    dense_weight,
    frozen_output,
    is_quantised,
    kernel_weight,
    merged_linear,
    quantised_linear,
    relative_entries,
    storage_of,
    weight_count,
)
from moka_pl.errors import BackboneError

#: The largest error of an entry, relative to the largest of all.
ERRORS = {"int8": 0.006, "int4": 0.07, "float8": 0.04, "hqq": 0.07}
N, M = 128, 48


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(M, N, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def layer(kind: str, weight: Tensor) -> nn.Linear:
    layer = quantised_linear(nn.Linear(N, M), weight, kind, True, torch.float32)
    layer.bias.data.normal_(generator=torch.Generator().manual_seed(1))
    return layer


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 3, N, generator=torch.Generator().manual_seed(2))


def test_the_weight_is_near_the_one_it_was_made_of(layer, kind: str, weight: Tensor) -> None:
    assert is_quantised(layer)
    dense = dense_weight(layer)
    assert dense.dtype is torch.float32
    assert 0 < (dense - weight).abs().max() <= ERRORS[kind] * weight.abs().max()
    assert weight_count(layer.weight) == M * N
    assert storage_of(layer.weight) == f"{kind}-float32"
    index = torch.tensor([[0, 1], [M * N - 1, N]])
    assert torch.equal(relative_entries(layer.weight, index), dense.flatten()[index])


def test_product_and_gradient_are_those_of_the_dequantised_weight(layer, x: Tensor) -> None:
    dense, inputs = dense_weight(layer), [x.clone().requires_grad_() for _ in range(2)]
    grad = torch.randn(2, 3, M, generator=torch.Generator().manual_seed(3))
    out, expected = layer(inputs[0]), F.linear(inputs[1], dense, layer.bias)
    assert torch.equal(out, expected)
    assert torch.equal(frozen_output(layer, False, x), expected)
    out.backward(grad)
    expected.backward(grad)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=1e-5, rtol=1e-5)


def test_any_dtype_goes_in_and_comes_out(layer, x: Tensor) -> None:
    for dtype in (torch.bfloat16, torch.float64):
        expected = F.linear(x.to(dtype).float(), dense_weight(layer), layer.bias).to(dtype)
        assert torch.equal(layer(x.to(dtype)), expected)
    with torch.autocast("cpu"):
        low = layer(x)
        assert torch.equal(frozen_output(layer, True, x.bfloat16()), low.bfloat16())
    assert low.dtype is torch.float32
    torch.testing.assert_close(low, layer(x), atol=0.3, rtol=0.05)


def test_the_product_keeps_nothing_of_the_weights_size(layer, x: Tensor) -> None:
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_()).sum()
    assert all(tensor.numel() < M * N for tensor in saved)


def test_casting_moving_and_copying_leave_the_weight(layer, x: Tensor) -> None:
    dense, out = dense_weight(layer), layer(x)
    copied = copy.deepcopy(layer)
    assert torch.equal(dense_weight(copied), dense)
    model = nn.Sequential(layer).to(torch.bfloat16).half().float()
    assert torch.equal(dense_weight(model[0]), dense)
    assert model[0].bias.dtype is torch.float32
    assert torch.equal(copied(x), out)
    assert copied.weight.stored is copied.stored is not layer.stored
    again = copy.deepcopy(pickle.loads(pickle.dumps(copied)))
    assert again.weight.stored is again.stored
    assert torch.equal(again(x), out)
    assert weight_count(again.weight) == M * N
    model.to("meta")  # what has no codes any more does not spoil a copy
    assert torch.equal(copied(x), out)


def test_kernels_leave_it_to_its_library(layer) -> None:
    pytest.importorskip("triton")
    assert kernel_weight(layer, torch.float32, even=True) is None


@pytest.mark.parametrize("backend", ["auto", "dense", "structured", "thin"])
def test_an_adapted_layer_is_the_one_on_the_dequantised_weight(layer, x: Tensor, backend: str) -> None:
    shapes = {"components": 2, "filters": [[8, 8], [4, 16]]}
    if backend == "thin":
        shapes = {"components": 1, "filters": "servable", "rank": 4, "target_modules": ["q"]}
    config = MokaConfig(backend=backend, **shapes)
    plain = nn.Linear(N, M)
    plain.weight, plain.bias = nn.Parameter(dense_weight(layer), False), layer.bias
    torch.manual_seed(0)
    adapted = MokaLinear(layer, config)
    torch.manual_seed(0)
    expected = MokaLinear(plain, config)
    for one in (adapted, expected):
        one.moka_B.data.normal_(generator=torch.Generator().manual_seed(5))
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outs = [one(given) for one, given in zip((adapted, expected), inputs, strict=True)]
    torch.testing.assert_close(*outs, atol=2e-4, rtol=1e-4)
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, atol=2e-2, rtol=1e-4)
    for name in ("moka_A", "moka_B", "moka_gate"):
        grads = (getattr(one, name).grad for one in (adapted, expected))
        torch.testing.assert_close(*grads, atol=2e-2, rtol=1e-4)
    codes = layer.weight.data.clone()
    adapted.merge()
    torch.testing.assert_close(adapted(x), outs[0].detach(), atol=2e-4, rtol=1e-4)
    assert torch.equal(adapted.merged_layer.weight, merged_linear(layer, adapted.get_delta_weight()).weight)
    adapted.unmerge()
    assert torch.equal(layer.weight.data, codes)


def test_int8_is_what_bitsandbytes_stores() -> None:
    weight = torch.randn(M, N, generator=torch.Generator().manual_seed(0))
    theirs = bnb.nn.Linear8bitLt(N, M, bias=False, has_fp16_weights=False)
    theirs.weight = bnb.nn.Int8Params(weight.clone(), requires_grad=False, has_fp16_weights=False).to("cpu")
    ours = quantised_linear(nn.Linear(N, M, bias=False), weight, "int8", True, torch.float32)
    assert isinstance(ours, QuantisedLinear)
    assert torch.equal(ours.weight.data.view(M, N), theirs.weight.data)
    scales = theirs.weight.SCB.float()  # (m,)
    torch.testing.assert_close(dense_weight(ours), theirs.weight.data * scales[:, None] / 127)


def test_torchaos_own_layers_are_refused_by_name() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(N, M))
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    with pytest.raises(BackboneError, match=r"^the layer: Int8Tensor of torchao cannot be adapted; load"):
        MokaLinear(model[0], MokaConfig(components=1))
