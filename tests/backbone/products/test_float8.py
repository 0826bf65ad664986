"""Frozen 4-bit layers that multiply in 8 bits while they train."""

import pytest
import torch
from torch import nn

from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.products.float8 import (
    check_float8,
    describe_float8,
    float8_product,
    input_gradient,
    keep_scales,
    multiplies_in_float8,
)
from moka_pl.backbone.quantization import dense_weight, quantised_linear
from moka_pl.errors import ConfigError

pytest.importorskip("triton")
pytestmark = pytest.mark.usefixtures("float8_rounding")


def _layer(m: int, n: int, kind: str = "nf4", bias: bool = False) -> nn.Module:
    torch.manual_seed(m)
    plain = nn.Linear(n, m, bias=bias)
    layer = quantised_linear(plain, torch.randn(m, n).bfloat16() / 8, kind, True, torch.bfloat16)
    keep_scales(layer)
    return layer.train()


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_layer_and_its_gradient_are_near_the_exact_ones(kind: str) -> None:
    layer = _layer(48, 64, kind)
    x = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    out = float8_product(layer, x, None)
    upstream = torch.randn_like(out)
    (found,) = torch.autograd.grad(out, x, upstream)
    weight = dense_weight(layer).double()
    exact, gradient = x.detach().double() @ weight.mT, upstream.double() @ weight
    assert out.shape == (2, 5, 48)
    assert 0.01 < (out.double() - exact).norm() / exact.norm() < 0.05
    assert 0.01 < (found.double() - gradient).norm() / gradient.norm() < 0.05
    assert torch.equal(input_gradient(layer, upstream.flatten(0, 1)), found.flatten(0, 1))
    out.mul_(2)  # as a model may


def test_biases_are_added() -> None:
    layer = _layer(48, 64, bias=True)
    x, bias = torch.randn(3, 64, dtype=torch.bfloat16), torch.full((48,), 100.0, dtype=torch.bfloat16)
    difference = float8_product(layer, x, bias).float() - float8_product(layer, x, None).float()
    assert (difference - 100).abs().max() < 0.5


def test_only_training_in_bfloat16_is_in_8_bits() -> None:
    layer = _layer(48, 64)
    assert multiplies_in_float8(layer, torch.bfloat16)
    assert not multiplies_in_float8(layer, torch.float32)
    assert not multiplies_in_float8(layer.eval(), torch.bfloat16)
    assert input_gradient(layer, torch.randn(3, 48, dtype=torch.bfloat16)) is None


@pytest.mark.parametrize("size", [(48, 72), (40, 64)])
def test_sizes_that_no_product_takes_stay_as_they_are(size: tuple[int, int]) -> None:
    layer = _layer(*size)
    assert not multiplies_in_float8(layer, torch.bfloat16)
    assert describe_float8(nn.Sequential(layer, _layer(16, 64))).endswith("1 of 2 frozen 4-bit layers")


@pytest.mark.parametrize(
    ("quantization", "missing"), [("nf4", "an NVIDIA GPU"), ("none", "quantization nf4 or fp4, not none")]
)
def test_what_is_missing_is_told_in_one_line(quantization: str, missing: str) -> None:
    with pytest.raises(ConfigError, match=missing) as caught:
        check_float8(torch.device("cpu"), torch.bfloat16, quantization)
    assert "\n" not in str(caught.value)
    assert "backbone.matmul bf16" in str(caught.value)


def test_adapters_do_not_rebuild_their_base_with_it() -> None:
    assert "matmul" not in BackboneConfig(matmul="fp8").options()
    with pytest.raises(ConfigError, match=r"backbone.matmul is 'fp4'; choose one of bf16, fp8"):
        BackboneConfig(matmul="fp4")


def test_layers_that_read_the_same_scale_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from moka_pl.ops.triton.float8 import products

    scaled = []
    original = products.scale_rows
    monkeypatch.setattr(products, "scale_rows", lambda x: scaled.append(x.shape) or original(x))
    query, value = _layer(48, 64), _layer(16, 64)
    leaf = torch.randn(2, 5, 64, dtype=torch.bfloat16, requires_grad=True)
    x = leaf * 2
    outs = [float8_product(layer, x, None) for layer in (query, value)]
    assert scaled == [(10, 64)]
    sum(out.sum() for out in outs).backward()
    assert len(scaled) == 1  # gradients of layers are never the same
    assert leaf.grad.isfinite().all()
