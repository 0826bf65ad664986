"""Inputs of checkpointed layers that are kept elsewhere: the same gradients, in the right order."""

from typing import Any

import pytest
import torch
from torch import Tensor

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.lm import offload
from moka_pl.lm.checkpointing import checkpoint_layers
from moka_pl.lm.offload import offload_layer_inputs
from moka_pl.lm.scoring import score_tokens

#: What became of each kept tensor, by its number.
EVENTS: list[tuple[str, int]] = []


class Kept:
    """A copy in the CPU's memory, which stands in for one on a GPU."""

    def __init__(self, tensor: Tensor, before: Any, free: Any) -> None:
        self.before, self.number = before, len([event for event, _ in EVENTS if event == "keep"])
        self._copy, self.free = tensor.detach().clone(), free
        EVENTS.append(("keep", self.number))

    def leave(self) -> None:
        EVENTS.append(("leave", self.number))

    def fetch(self) -> None:
        EVENTS.append(("fetch", self.number))

    def take(self) -> Tensor:
        EVENTS.append(("take", self.number))
        return self._copy


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    monkeypatch.setattr(offload, "_Kept", Kept)
    monkeypatch.setattr(offload, "_worth_a_copy", torch.is_floating_point)
    EVENTS.clear()
    return EVENTS


def step(model: Any) -> tuple[Tensor, ...]:
    ids = torch.arange(3, 25).view(2, 11)
    loss = score_tokens(model, ids, ids).nll.sum()
    return loss.detach(), *torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])


def test_gradients_stay_the_same_bit_for_bit(tiny_llama: Any, randomize: Any, kept: Any) -> None:
    inject_adapter(tiny_llama, MokaConfig(components=2, target_modules="all-linear"))
    randomize(tiny_llama)
    tiny_llama.train()
    plain = step(tiny_llama)
    checkpoint_layers(tiny_llama)
    checkpointed = step(tiny_llama)
    assert not kept
    offload_layer_inputs(tiny_llama)
    for found, one, other in zip(step(tiny_llama), checkpointed, plain, strict=True):
        assert torch.equal(found, one)
        torch.testing.assert_close(found, other)
    layers = tiny_llama.config.num_hidden_layers
    count = len([event for event, _ in kept if event == "keep"])
    assert count > layers  # the last norm's input, too
    # Each leaves once the next is kept, and is fetched once the next is taken.
    assert [n for event, n in kept if event == "leave"] == list(range(count - 1))
    taken = [n for event, n in kept if event == "take"]
    assert sorted(set(taken)) == list(range(count))
    for number in range(layers - 1):
        assert kept.index(("take", number + 1)) < kept.index(("fetch", number)) < kept.index(("take", number))


def test_batches_of_other_sizes_share_the_host_s_memory(kept: Any) -> None:
    store = offload._Store()
    first, longer, half = (store.pack(torch.ones(2, length, 32)).free for length in (1000, 1024, 512))
    assert first is longer
    assert half is not first
    assert store.pack(torch.ones(2, 1000, 32).bfloat16()).free is not first


def test_an_evaluation_keeps_nothing(tiny_llama: Any, kept: Any) -> None:
    offload_layer_inputs(tiny_llama)
    ids = torch.arange(3, 25).view(2, 11)
    tiny_llama.train()
    with torch.no_grad():
        score_tokens(tiny_llama, ids, ids)
    tiny_llama.eval()
    score_tokens(tiny_llama, ids, ids)
    assert not kept


def test_an_error_in_a_layer_leaves_no_hooks_behind(tiny_llama: Any, kept: Any) -> None:
    offload_layer_inputs(tiny_llama)
    tiny_llama.train()
    with pytest.raises(IndexError):
        score_tokens(tiny_llama, torch.full((1, 4), 10**6), torch.ones(1, 4, dtype=torch.long))
    kept.clear()
    x = torch.ones(3, requires_grad=True)
    (x * x).sum().backward()
    assert not kept


def test_a_cpu_keeps_its_tensors(tiny_llama: Any) -> None:
    tensor = torch.ones(2**17)
    assert offload._Store().pack(tensor) is tensor
