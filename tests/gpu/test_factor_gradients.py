"""Factors' gradients without the gradient of ΔW, and frozen products; run with ``pytest -m gpu``."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moka_pl.adapters.filters import filter_shapes
from moka_pl.backbone.products.frozen import fuse_products
from moka_pl.backbone.quantization import quantised_linear
from moka_pl.lm.replaced_forward import forward_maker
from moka_pl.ops.dense import project
from moka_pl.ops.layout import left_sizes, right_sizes
from moka_pl.ops.triton import Gates, fused_projection, make_plan
from moka_pl.ops.triton.factor_gradients import factor_gradients, make_factor_plan

pytestmark = pytest.mark.gpu

SIZES = [
    (4096, 4096),
    (11008, 4096),
    (4096, 11008),
    (1024, 4096),
    (14336, 4096),
    (192, 576),
    (1536, 576),
    (3967, 4113),
    (4099, 4096),
    (50257, 768),
]


@pytest.mark.parametrize("tokens", [1, 77, 4096])
@pytest.mark.parametrize("components", [1, 2, 5])
@pytest.mark.parametrize(("m", "n"), SIZES)
def test_their_error_is_that_of_bfloat16(m: int, n: int, components: int, tokens: int) -> None:
    generator = torch.Generator("cuda").manual_seed(m + n + tokens)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device="cuda", generator=generator)

    shapes = filter_shapes("diverse", components, m, n)
    plan = make_plan(shapes, m, n, torch.device("cuda"))
    left, right = draw(sum(left_sizes(shapes))), draw(sum(right_sizes(shapes)))
    x, grad = draw(tokens, n).bfloat16(), draw(tokens, m).bfloat16()
    weights = draw(components).softmax(0)
    sums = make_factor_plan(plan)
    assert sums is not None
    if not sums.fits:  # some matrices are too large for a program
        assert not sums.usable(tokens)
        return
    found = factor_gradients(plan, sums, grad, x, left, right, Gates(weights))
    usual = fused_projection(plan, grad.mT @ x, left, right, Gates(weights))
    parts = left.double(), right.double(), weights.double()
    exact = project(grad.double().mT @ x.double(), *parts, shapes)
    for ours, other, expected in zip(found[:2], usual[:2], exact[:2], strict=True):
        error, before = ((g.double() - expected).norm() / expected.norm() for g in (ours, other))
        assert error < 1e-2, (error, before)
        assert error < 2.5 * before + 1e-3, (error, before)
    again = factor_gradients(plan, sums, grad, x, left, right, Gates(weights))
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("tokens", [100, 2000])
def test_a_frozen_product_has_the_bits_of_bitsandbytes(dtype: torch.dtype, nested: bool, tokens: int) -> None:
    torch.manual_seed(tokens)
    weight = torch.randn(192, 576, device="cuda") / 24
    layer: Any = quantised_linear(nn.Linear(576, 192, bias=nested), weight, "nf4", nested, dtype).cuda()
    layer.requires_grad_(False)
    x = torch.randn(tokens, 576, device="cuda", dtype=dtype, requires_grad=True)
    results = []
    for _ in range(2):
        out = layer(x)
        results.append((out.detach(), torch.autograd.grad(out.float().square().sum(), x)[0]))
        fuse_products(nn.Sequential(layer))
    assert forward_maker(layer) is not None
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])
