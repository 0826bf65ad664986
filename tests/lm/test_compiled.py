"""Decoder layers compiled for training, and plain in everything else."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import reset
from torch._dynamo.utils import counters

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone.quantization import quantised_linear
from moka_pl.errors import BackboneError, ConfigError
from moka_pl.lm.compiled import check_compiler, compile_layers, restore_layers
from moka_pl.lm.replaced_forward import forward_maker


@pytest.fixture(autouse=True)
def forgotten():
    """Forgets what was compiled before."""
    reset()
    counters.clear()


@pytest.fixture
def adapted(make_llama, randomize):
    """Builds tiny models with adapters, in training mode."""

    def make(four_bit: bool = False, checkpointing: bool = False, **options) -> nn.Module:
        # bitsandbytes misreads rows of 32 on some CPUs.
        model = make_llama(hidden_size=64, intermediate_size=128).requires_grad_(False)
        for name, layer in list(model.model.named_modules()) if four_bit else []:
            if type(layer) is nn.Linear:
                stored = quantised_linear(layer, layer.weight.data, "nf4", True, torch.float32)
                model.model.set_submodule(name, stored)
        inject_adapter(model, MokaConfig(**{"target_modules": "all-linear"} | options))
        randomize(model)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()  # else the first layer has a graph of its own
        return model.train()

    return make


def results(model: nn.Module, rows: int, length: int) -> list[Tensor]:
    """Logits and gradients of some tokens."""
    ids = torch.randint(96, (rows, length), generator=torch.Generator().manual_seed(length))
    logits = model(input_ids=ids, use_cache=False).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    return [logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), trained)]


SIZES = ((2, 7), (3, 9))


def check(model: nn.Module, backend: str) -> None:
    """Compares with the plain model; both have the same numbers where no kernels are generated."""
    expected = [results(model, *size) for size in SIZES]
    assert compile_layers(model, backend) == 2
    for size, plain in zip(SIZES, expected, strict=True):
        found = results(model, *size)
        for mine, theirs in zip(found, plain, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 1


def test_steps_are_compiled_once_for_all_lengths_and_everything_else_is_not(adapted) -> None:
    model = adapted(filters="servable", components=2, rank=2, target_modules=["q_proj"])
    names = list(model.state_dict())
    check(model, "eager")
    graphs = counters["stats"]["unique_graphs"]
    assert list(model.state_dict()) == names
    with torch.no_grad():
        model(input_ids=torch.ones(1, 5, dtype=torch.long))
        model.eval().generate(torch.ones(1, 3, dtype=torch.long), max_new_tokens=2, do_sample=False)
    twin = copy.deepcopy(model)
    assert counters["stats"]["unique_graphs"] == graphs
    for one in (model, twin):
        assert all(forward_maker(layer) for layer in one.model.layers)
        restore_layers(one)
        assert not any(forward_maker(layer) for layer in one.model.layers)


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_graphs_of_forward_and_backward_give_the_plain_models_gradients(adapted, checkpointing) -> None:
    kind = {"filters": "servable", "rank": 2} if checkpointing else {"components": 3}
    check(adapted(checkpointing, checkpointing, target_modules=["q_proj", "down_proj"], **kind), "aot_eager")


def test_a_model_without_a_list_of_layers_is_refused(adapted) -> None:
    model = adapted(components=1)
    model.model.layers = nn.ModuleDict({"0": model.model.layers[0]})
    with pytest.raises(BackboneError, match=r"^LlamaForCausalLM has no list .*compile none$"):
        compile_layers(model)


@pytest.mark.parametrize(("device", "needed"), [("cpu", r"g\+\+"), ("cuda", "Triton")])
def test_what_nothing_can_compile_is_refused(monkeypatch, device, needed) -> None:
    check_compiler(torch.device("cpu"))
    monkeypatch.setattr("moka_pl.lm.compiled.which", lambda name: None)
    monkeypatch.setattr("moka_pl.lm.compiled.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=rf"^backbone\.compile is layers, which needs .*{needed}"):
        check_compiler(torch.device(device))
