"""Thin products on a CUDA device; run with ``pytest -m gpu``."""

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, MokaLinear
from moka_pl.adapters.forward import plan_forward
from moka_pl.backbone.quantization import dense_weight, kernel_weight
from moka_pl.ops.kronecker import delta_weight, kronecker_linear
from moka_pl.ops.triton import (
    FusedThinUpdates,
    can_dequantise,
    layer_gates,
    make_thin_plan,
    merged_weight,
    thin_matrices,
)
from moka_pl.ops.triton.reference import round_by_thresholds

pytestmark = pytest.mark.gpu

#: Rows, columns, tokens and options.
LAYERS = {
    "7B's q": (4096, 4096, 2048, {}),
    "7B's gate": (11008, 4096, 1600, {}),
    "7B's down": (4096, 11008, 1600, {"components": 2}),
    "GQA's k": (1024, 4096, 2000, {"rank": 64}),
    "SmolLM2's, few tokens": (192, 576, 100, {"rank": 4, "components": 4}),
    "rank 7": (3584, 3584, 1700, {"rank": 7}),
    "odd sizes": (1000, 1016, 1601, {"filters": [[3, 340, 340, 3], [1, 508, 1000, 2]], "components": 2}),
    "odd, dequantised by others": (197, 83, 65, {"rank": 4}),
}


def _layer(m: int, n: int, dtype: torch.dtype, options: dict, four_bit: bool = True) -> MokaLinear:
    """An adapted layer with factors of ordinary size."""
    torch.manual_seed(m + n)
    if four_bit:
        base = bnb.nn.Linear4bit(n, m, bias=False, compute_dtype=dtype, quant_type="nf4").to("cuda")
    else:
        base = nn.Linear(n, m, bias=False, device="cuda")
    servable = {} if "filters" in options else {"filters": "servable", "rank": 16}
    config = MokaConfig(**{"components": 1} | servable | options)
    layer = MokaLinear(base.to(dtype).requires_grad_(False), config)
    with torch.no_grad():
        layer.moka_B.normal_(std=0.05)
        if layer.moka_gate is not None:
            layer.moka_gate.normal_()
    return layer


def _error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.detach().double() - reference.detach()).norm() / reference.detach().norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_layers_agree_with_float64_and_leave_nothing_unwritten(case: str, dtype: torch.dtype) -> None:
    m, n, tokens, options = LAYERS[case]
    layer = _layer(m, n, dtype, options)
    x = torch.randn(tokens, n, device="cuda", dtype=dtype, requires_grad=True)
    upstream = torch.randn(tokens, m, device="cuda", dtype=dtype)
    assert isinstance(plan_forward(layer, x).updates, FusedThinUpdates)
    wanted = [p for p in (x, layer.moka_A, layer.moka_B, layer.moka_gate) if p is not None]
    # What the kernels do not write stays NaN.
    torch.use_deterministic_algorithms(True)  # fills new memory
    try:
        runs = [(out := layer(x), *torch.autograd.grad(out, wanted, upstream)) for _ in range(2)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))

    exact = [p.detach().double().requires_grad_() for p in wanted]
    alpha = torch.ones(1, device="cuda") if layer.moka_gate is None else exact[3].softmax(0)
    delta = delta_weight(alpha.double() * layer.scaling, exact[1], exact[2], layer.shapes, m, n)
    target = exact[0] @ (dense_weight(layer.base_layer).double() + delta).mT
    expected = torch.autograd.grad(target, exact, upstream.double())
    bound = 1e-2 if dtype is torch.bfloat16 else 2e-5
    assert _error(runs[0][0], target) < bound
    for found, reference in zip(runs[0][1:4], expected[:3], strict=True):
        assert _error(found, reference) < bound
    if layer.moka_gate is not None and layer.components > 1:
        assert _error(runs[0][4], expected[3]) < 3 * bound  # nearly equal sums are subtracted


@pytest.mark.parametrize("four_bit", [False, True])
@pytest.mark.parametrize("tokens", [33, 512, 1537, 4096])
@pytest.mark.parametrize("case", ["7B's q", "7B's gate", "7B's down", "GQA's k", "odd sizes"])
def test_the_start_is_the_frozen_layer_bit_for_bit(case: str, tokens: int, four_bit: bool) -> None:
    m, n, _, options = LAYERS[case]
    layer = _layer(m, n, torch.bfloat16, options, four_bit)
    with torch.no_grad():
        layer.moka_B.zero_()
    x = torch.randn(1, tokens, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (11008, 4096), (1000, 1016), (3, 8)])
def test_weights_are_dequantised_as_bitsandbytes_does(
    m: int, n: int, nested: bool, dtype: torch.dtype
) -> None:
    base = bnb.nn.Linear4bit(
        n, m, bias=False, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested
    )
    base = base.to(dtype).to("cuda")
    layer = MokaLinear(base.requires_grad_(False), MokaConfig(filters=[[1, n, m, 1]], components=1))
    source = kernel_weight(base, dtype, even=True)
    assert can_dequantise(source, m * n)
    plan = make_thin_plan(layer.shapes, m, n, torch.device("cuda", 0))
    gates = layer_gates(plan.plan, None, 1.0)
    _, found = thin_matrices(plan, layer.moka_A, layer.moka_B, gates, dtype, source)
    assert torch.equal(found, dense_weight(base).to(dtype))


@pytest.mark.parametrize("rank", [4, 16, 32])
@pytest.mark.parametrize(("m", "n"), [(4096, 4096), (11008, 4096), (4096, 11008), (1024, 4096), (192, 576)])
def test_merged_weights_are_their_reference_bit_for_bit(m: int, n: int, rank: int) -> None:
    layer = _layer(m, n, torch.bfloat16, {"rank": rank})
    plan = make_thin_plan(layer.shapes, m, n, torch.device("cuda", 0))
    gates = layer_gates(plan.plan, None, layer.scaling)
    source = kernel_weight(layer.base_layer, torch.bfloat16, even=True)
    assert plan.merged
    parts = layer.moka_A.detach(), layer.moka_B.detach()
    weight = dense_weight(layer.base_layer).to(torch.bfloat16)
    found = merged_weight(plan, *parts, gates, torch.bfloat16, source)
    (shape,) = layer.shapes
    delta = torch.kron(
        parts[0].view(shape.m_a, shape.n_a), (parts[1] * layer.scaling).view(shape.m_b, shape.n_b)
    )
    assert torch.equal(found, round_by_thresholds(weight.float() + delta))
    assert torch.equal(merged_weight(plan, parts[0], parts[1] * 0, gates, torch.bfloat16, source), weight)
    bad = parts[0].clone()
    bad[5], bad[7] = float("nan"), float("inf")
    shown = merged_weight(plan, bad, parts[1], gates, torch.bfloat16, source)
    delta = torch.kron(bad.view(shape.m_a, shape.n_a), parts[1].view(shape.m_b, shape.n_b))
    assert torch.equal(shown.isnan(), delta.isnan())
    assert torch.equal(shown.isinf(), delta.isinf())


@pytest.mark.parametrize("case", ["7B's q", "GQA's k"])
def test_a_captured_step_is_the_step_itself(case: str) -> None:
    m, n, tokens, options = LAYERS[case]
    layer = _layer(m, n, torch.bfloat16, options)
    x = torch.randn(tokens, n, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = [x, layer.moka_A, layer.moka_B]

    def step() -> list[torch.Tensor]:
        out = layer(x)
        return [out, *torch.autograd.grad(out.float().square().sum(), wanted)]

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.normal_()
        layer.moka_B.normal_(std=0.05)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


def test_an_update_alone_agrees_with_float64() -> None:
    m, n, tokens, options = LAYERS["odd sizes"]
    layer = _layer(m, n, torch.bfloat16, options)
    x = torch.randn(2, tokens, n, device="cuda", dtype=torch.bfloat16)
    weights = torch.randn(2, device="cuda")
    found = kronecker_linear(x, weights, layer.moka_A, layer.moka_B, layer.shapes, m)
    factors = layer.moka_A.double(), layer.moka_B.double()
    assert _error(found, x.double() @ delta_weight(weights.double(), *factors, layer.shapes, m, n).mT) < 1e-2
