"""Each kind of gates through the kernels of a CUDA device; run with ``pytest -m gpu``."""

import bitsandbytes as bnb
import pytest
import torch

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.backbone.quantization import dense_weight
from moka_pl.ops.kronecker import delta_weight

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("gating", ["softmax", "sigmoid", "none"])
@pytest.mark.parametrize("filters", ["diverse", "prime"])
def test_a_layer_agrees_with_float64_for_many_tokens_and_a_few(filters: str, gating: str) -> None:
    torch.manual_seed(0)
    m, n, r = 192, 576, 10
    base = bnb.nn.Linear4bit(n, m, compute_dtype=torch.bfloat16, quant_type="nf4").to("cuda")
    layer = MokaLinear(base.requires_grad_(False), MokaConfig(filters=filters, gating=gating))
    with torch.no_grad():
        layer.moka_B.normal_(std=0.02)
        if layer.moka_gate is not None:
            layer.moka_gate.normal_()
    x = torch.randn(64, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    upstream = torch.randn(64, m, device="cuda", dtype=torch.bfloat16)
    wanted = {"x": x} | {name: p for name, p in layer.named_parameters() if name.startswith("moka_")}
    out = layer(x)
    found = torch.autograd.grad(out, list(wanted.values()), upstream)

    exact = {name: p.detach().double().requires_grad_() for name, p in wanted.items()}
    if gating == "none":
        alpha = torch.full((r,), 1 / r, device="cuda", dtype=torch.float64)
    else:
        g = exact["moka_gate"]
        alpha = g.softmax(0) if gating == "softmax" else 2 / r * g.sigmoid()
    left = exact.get("moka_A", exact["moka_B"].new_empty(0))
    delta = delta_weight(alpha * layer.scaling, left, exact["moka_B"], layer.shapes, m, n)
    target = exact["x"] @ (dense_weight(layer.base_layer).double() + delta).mT
    target = target + layer.base_layer.bias.double()
    expected = torch.autograd.grad(target, list(exact.values()), upstream.double())
    for name, ours, theirs in zip(("y", *wanted), (out, *found), (target, *expected), strict=True):
        assert (ours.double() - theirs).norm() < 1e-2 * theirs.norm(), name
    with torch.no_grad():
        few = layer(x[:2])
    assert (few.double() - target[:2]).norm() < 1e-2 * target[:2].norm()
