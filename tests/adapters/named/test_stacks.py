"""Factors of the rows of a batch, gathered for all layers at once."""

from collections.abc import Callable

import pytest
import torch
from shared.launches import Launches

from moka_pl import MokaAdapters
from moka_pl.adapters import MokaConfig
from moka_pl.adapters.named import stacks
from moka_pl.adapters.named.stacks import LayerStacks
from moka_pl.backbone import BackboneConfig, load_backbone

SAME = {"a": MokaConfig(components=2), "b": MokaConfig(components=2), "c": MokaConfig(components=2)}
FEWER = SAME | {"c": MokaConfig(components=2, target_modules=["q_proj"])}


def make(configs: dict[str, MokaConfig], randomize: Callable) -> LayerStacks:
    model = load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).model
    named = MokaAdapters(model)
    for seed, (name, config) in enumerate(configs.items()):
        named.add_adapter(name, config)
        named.set_adapter(name)
        randomize(model, seed=seed)
    layers: dict = {}
    for name, own in named._layers.items():
        for target, layer in own.items():
            layers.setdefault(target, {})[name] = layer
    made = LayerStacks(layers)
    made.fill()
    return made


def listed(made: LayerStacks) -> list[stacks.Stack]:
    return [stack for of_layer in made.of.values() for stack in of_layer]


@pytest.mark.parametrize("most", [0, stacks._GATHERED])
@pytest.mark.parametrize("configs", [SAME, FEWER], ids=["same", "fewer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_layer_gets_the_factors_of_its_rows(
    dtype: torch.dtype, configs: dict, most: int, randomize: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stacks, "_GATHERED", most)
    for stack in listed(make(configs, randomize)):
        adapter = torch.tensor([1, 0, 1, len(stack.names) - 1])
        assert torch.equal(stack.of_rows(adapter, dtype), stack.factors[adapter].to(dtype))


def test_those_of_layers_with_the_same_adapters_are_gathered_once(randomize: Callable) -> None:
    made, adapter = make(SAME, randomize), torch.tensor([1, 0, 2])
    shared = {id(stack.shared) for stack in listed(made)}
    with Launches() as launches:
        for stack in listed(made):
            stack.of_rows(adapter, torch.float32)
    assert len(listed(made)) == 2 * len(shared)  # both blocks' layers of a size share them
    assert launches.count <= 4 * len(shared)


def test_nothing_gathered_is_kept_or_taken_for_that_of_another_batch(randomize: Callable) -> None:
    made = make(SAME, randomize)
    stack, adapter = listed(made)[0], torch.tensor([1, 0])
    first = stack.of_rows(adapter, torch.float32)
    made.clear()
    assert stack.shared.factors is None
    made.fill()
    with torch.no_grad():
        stack.shared.factors += 1
    assert torch.equal(stack.of_rows(adapter, torch.float32), first + 1)
    assert torch.equal(stack.of_rows(torch.tensor([0, 1]), torch.float32), first.flip(0) + 1)
