"""Gradients of frozen weights, against autograd."""

import math

import pytest
import torch

from moka_pl.adapters import MokaConfig, find_targets
from moka_pl.adapters.filter_search.gradients import weight_gradients
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.errors import AdapterError, NonFiniteError
from moka_pl.lm.scoring import score_tokens


def batches_of(count: int) -> list[torch.Tensor]:
    return list(torch.randint(90, (count, 2, 7), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("memory", [1, 2**13, 2**31])  # a layer a pass, some, all
def test_they_are_those_of_autograd_and_leave_no_trace(tiny_llama, memory: int) -> None:
    model = tiny_llama.train()
    names = find_targets(model, MokaConfig())
    batches = batches_of(3)
    passes = []

    def loss(ids: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return score_tokens(model, ids, ids).nll.sum()

    model.eval()
    sum(loss(ids) for ids in batches).backward()
    expected = {name: model.get_submodule(name).weight.grad.clone() for name in names}
    model.zero_grad()
    model.train()
    passes.clear()
    model.requires_grad_(False)
    found = dict(weight_gradients(model, names, batches, loss, memory))
    assert list(found) == names
    assert model.training
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)
        assert not model.get_submodule(name)._forward_hooks
    assert all(p.grad is None for p in model.parameters())
    assert len(passes) == 3 * {1: 4, 2**13: 2, 2**31: 1}[memory]


def test_a_model_that_trains_gets_no_gradients(tiny_llama) -> None:
    names = find_targets(tiny_llama, MokaConfig())
    loss = lambda ids: score_tokens(tiny_llama, ids, ids).nll.mean()  # noqa: E731
    found = dict(weight_gradients(tiny_llama, names, batches_of(1), loss))
    assert all(float(g.abs().max()) > 0 for g in found.values())
    assert all(p.grad is None for p in tiny_llama.parameters())


def test_checkpointed_activations_give_the_same(tiny_llama) -> None:
    model = tiny_llama.requires_grad_(False)
    names = find_targets(model, MokaConfig())
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    loss = lambda ids: score_tokens(model, ids, ids).nll.sum()  # noqa: E731
    expected = dict(weight_gradients(model, names, batches_of(2), loss))
    assert len(calls) == 2
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = dict(weight_gradients(model, names, batches_of(2), loss))
    assert len(calls) == 6  # computed again in the backward pass
    assert not model.training
    for name in names:
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=0)
        assert not model.get_submodule(name)._forward_hooks


def test_four_bit_layers_and_layers_that_play_no_part() -> None:
    loaded = load_backbone(BackboneConfig(name="tiny", weights="random", quantization="nf4"), "cpu")
    names = find_targets(loaded.model, MokaConfig())
    ids = batches_of(1)
    loss = lambda x: score_tokens(loaded.model, x, x).nll.mean()  # noqa: E731
    found = dict(weight_gradients(loaded.model, names, ids, loss))
    assert all(float(g.abs().max()) > 0 for g in found.values())
    idle = dict(weight_gradients(loaded.model, names[:1], ids, lambda _: torch.zeros((), requires_grad=True)))
    assert idle[names[0]].shape == found[names[0]].shape
    assert not idle[names[0]].any()


def test_only_linear_layers_have_them(tiny_llama) -> None:
    with pytest.raises(AdapterError, match=r"model\.norm is a LlamaRMSNorm"):
        next(weight_gradients(tiny_llama, ["model.norm"], [], lambda _: torch.zeros(())))


def test_one_that_is_not_finite_is_named(tiny_llama) -> None:
    names = find_targets(tiny_llama, MokaConfig())
    loss = lambda ids: score_tokens(tiny_llama, ids, ids).nll.sum() * math.nan  # noqa: E731
    with pytest.raises(NonFiniteError, match=f"{names[0]} over the first batches is not finite"):
        list(weight_gradients(tiny_llama, names, batches_of(1), loss))
