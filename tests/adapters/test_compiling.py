"""Layers under ``torch.compile``: one graph each, and the numbers of the layer without a compiler."""

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.testing import CompileCounter

from moka_pl.adapters import MokaConfig, MokaLinear

M, N = 24, 64  # bitsandbytes misreads rows of 32 on some CPUs

KINDS = {
    "diverse": {"components": 3},
    "servable": {"filters": "servable", "components": 2, "rank": 2},
    "ungated": {"components": 2, "gating": "none"},
    "prime": {"components": 1, "filters": "prime", "gating": "sigmoid"},
    "listed": {"components": 2, "filters": [[2, 64, 12, 1], [1, 22, 24, 3]]},
}


#: Tried first.
QUICK = ("diverse", "servable")


def adapted(four_bit: bool = False, bias: bool = True, **options) -> MokaLinear:
    """A layer with random factors and gates."""
    torch.manual_seed(0)
    base: nn.Linear = nn.Linear(N, M, bias=bias)
    if four_bit:
        quantised = bnb.nn.Linear4bit(N, M, bias=bias, compute_dtype=torch.float32, quant_type="nf4")
        quantised.load_state_dict(base.state_dict())
        base = quantised.to("cpu")
    layer = MokaLinear(base.requires_grad_(False), MokaConfig(**options))
    for name, parameter in layer.named_parameters():
        if name.startswith("moka_"):
            nn.init.normal_(parameter, std=0.5)
    return layer


def results(layer: nn.Module, tokens: int, autocast: bool = False) -> list[Tensor]:
    """Output and all gradients for so many tokens in each of two rows."""
    x = torch.randn(2, tokens, N, generator=torch.Generator().manual_seed(1)).requires_grad_()
    layer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = layer(x)
    out.square().sum().backward()
    return [out, x.grad, *(p.grad for p in layer.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_one_graph_gives_the_same_outputs_and_gradients_bit_for_bit(kind) -> None:
    reset()
    layer = adapted(four_bit=kind in ("diverse", "servable"), **KINDS[kind])
    counter = CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for tokens in (7, 9, 30):  # static, dynamic, and the dynamic one again
        found, expected = results(compiled, tokens), results(layer, tokens)
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
    assert counter.frame_count == 2


def test_layers_of_one_shape_share_a_graph() -> None:
    reset()
    counter = CompileCounter()
    for scaling in (1.0, 1.0, 2.0):
        layer = adapted(components=2, scaling=scaling)
        torch.compile(layer, backend=counter, fullgraph=True)(torch.ones(3, N))
    assert counter.frame_count == 1


def test_dropout_keeps_layer_and_update_apart_in_one_graph() -> None:
    reset()
    layer = adapted(four_bit=True, dropout=0.5, components=2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    both = []
    for run in (compiled, layer):
        torch.manual_seed(3)
        both.append(results(run, 5))
    assert all(map(torch.equal, *both))


def test_hooks_of_the_frozen_layer_are_called() -> None:
    reset()
    layer, heard = adapted(components=2), []
    layer.base_layer.register_forward_hook(lambda *of_call: heard.append(of_call))
    found = torch.compile(layer, backend="eager")(torch.ones(3, N))
    assert len(heard) == 1
    assert torch.equal(found, layer(torch.ones(3, N)))


@pytest.mark.parametrize("four_bit", [False, True])
def test_autocast(four_bit) -> None:
    layer = adapted(four_bit, components=2, filters="servable", rank=2)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    reset()
    found, expected = results(compiled, 5, autocast=True), results(layer, 5, autocast=True)
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert all(map(torch.equal, found, expected))


def test_layers_that_are_merged_or_switched_off() -> None:
    layer, x = adapted(components=2), torch.ones(3, N)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    reset()
    with torch.no_grad():
        plain = layer(x)
        torch.testing.assert_close(compiled(x), plain, rtol=0, atol=0)
        layer.merge()
        torch.testing.assert_close(compiled(x), plain)
        layer.unmerge()
        layer.enabled = False
        assert torch.equal(compiled(x), layer.base_layer(x))
