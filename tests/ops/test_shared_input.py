"""Layers that read one tensor form a chain, whatever a loss needs of them, and nothing outlives its use."""

import threading
import weakref
from collections.abc import Iterator
from functools import partial
from itertools import combinations
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from shared.tiny import SIZES as TINY
from shared.tiny import build
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CohereConfig, LlamaConfig, PretrainedConfig, Qwen3Config

from moka_pl.adapters import MokaConfig, MokaLinear, inject_adapter
from moka_pl.backbone.linear_layers import quantise_rest
from moka_pl.backbone.quantization import FrozenProduct
from moka_pl.ops import shared_input
from moka_pl.ops.shared_input import call_sharing

SIZES = {"q": (48, 32), "k": (16, 32), "v": (16, 32)}
CONFIGS: dict[str, MokaConfig | None] = {
    "frozen": None,
    "dense": MokaConfig(components=2, backend="dense"),
    "structured": MokaConfig(components=2, backend="structured"),
    "thin": MokaConfig(components=2, filters="servable", rank=4),
}


class Frozen(nn.Module):
    """As the package's frozen layers on a GPU."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor) -> Tensor:
        weight = self.linear.weight
        return call_sharing(FrozenProduct, x, self.linear.bias, lambda: weight)


class Block(nn.Module):
    """Queries, keys and values of a norm's output, some of which are adapted."""

    def __init__(self, **configs: MokaConfig | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(32, dtype=torch.float64)
        for name, (m, n) in SIZES.items():
            base = nn.Linear(n, m, bias=name == "k", dtype=torch.float64).requires_grad_(False)
            config = configs[name]
            layer = Frozen(base) if config is None else MokaLinear(base, config, torch.float64)
            for parameter in layer.parameters():
                nn.init.normal_(parameter, std=0.3) if parameter.requires_grad else None
            setattr(self, name, layer)

    def forward(self, hidden: Tensor) -> tuple[Tensor, ...]:
        x = self.norm(hidden)
        return tuple(getattr(self, name)(x) for name in SIZES)


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shared_input, "devices", {"cpu"})
    yield
    assert shared_input._last.link is None  # every test's graph is gone


def alone(monkeypatch: pytest.MonkeyPatch, function: Any) -> Any:
    """What a function returns where nothing is shared."""
    with monkeypatch.context() as patch:
        patch.setattr(shared_input, "devices", set())
        return function()


def numbers() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 5, 32, dtype=torch.float64, generator=generator).requires_grad_()


def gradients(block: Block, wanted: Any = SIZES, again: bool | None = None) -> list[Tensor | None]:
    hidden = numbers()
    outs = block(hidden) if again is None else checkpoint(block, hidden, use_reentrant=again)
    loss = sum(out.sin().sum() for name, out in zip(SIZES, outs, strict=True) if name in wanted)
    leaves = [hidden, *(p for p in block.parameters() if p.requires_grad)]
    if again:  # reentrant checkpointing knows no other way
        for leaf in leaves:
            leaf.grad = None
        loss.backward()
        return [leaf.grad for leaf in leaves]
    return list(torch.autograd.grad(loss, leaves, allow_unused=True))


def assert_close(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    assert [one is None for one in found] == [one is None for one in expected]
    for one, other in zip(found, expected, strict=True):
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def readers(block: Block) -> int:
    """How many functions hand a gradient straight to the norm's output."""
    outs, node = block(numbers()), "NativeLayerNormBackward0"
    found, seen, left = 0, set(), [out.grad_fn for out in outs]
    while left:
        function = left.pop()
        if function is None or function in seen:
            continue
        seen.add(function)
        nexts = [edge for edge, _ in function.next_functions]
        found += sum(edge is not None and edge.name() == node for edge in nexts)
        left += nexts
    return found


ALL = pytest.mark.parametrize("names", [(q, k, v) for q in CONFIGS for k in ("frozen", q) for v in CONFIGS])


def make(names: tuple[str, str, str]) -> Block:
    return Block(**{layer: CONFIGS[name] for layer, name in zip(SIZES, names, strict=True)})


@ALL
def test_gradients_are_autograds_whatever_a_loss_needs(
    names: tuple[str, str, str], sharing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make(names)
    assert readers(block) == 1
    assert alone(monkeypatch, partial(readers, block)) == 3
    for count in (1, 2, 3):
        for wanted in combinations(SIZES, count):
            assert_close(gradients(block, wanted), alone(monkeypatch, partial(gradients, block, wanted)))


@pytest.mark.parametrize("reentrant", [False, True])
@ALL
def test_checkpointed_layers_share(
    names: tuple[str, str, str], reentrant: bool, sharing: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make(names)
    assert_close(gradients(block, SIZES, reentrant), alone(monkeypatch, partial(gradients, block)))


def test_a_cpu_shares_nothing() -> None:
    assert readers(make(("frozen", "dense", "thin"))) == 3


def test_losses_one_after_another_and_twice(sharing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(("dense", "frozen", "thin"))
    x = numbers().detach().requires_grad_()

    def sums() -> list[Tensor]:
        outs = [getattr(block, name)(x) for name in SIZES]
        x.grad = None
        outs[0].sum().backward(retain_graph=True)
        outs[0].sum().backward()  # frees what the first layer has kept
        found = []
        for out in outs[1:]:
            out.cos().sum().backward()
            found.append(x.grad.clone())
        return found

    assert_close(sums(), alone(monkeypatch, sums))


def test_what_is_changed_or_another_tensor_is_read_anew(sharing: None) -> None:
    block = make(("frozen", "frozen", "frozen"))
    x = numbers() * 1
    q = block.q(x)
    x.mul_(2)
    k = block.k(x)
    v = block.v(x.clone())
    found = torch.autograd.grad(q.sum() + k.sum() + v.sum(), x)[0]
    # The first layer read x before it was changed: its gradient goes there.
    expected = block.k.linear.weight.sum(0) + block.v.linear.weight.sum(0)
    torch.testing.assert_close(found, expected.expand_as(found))


def test_hooks_see_the_input_and_its_whole_gradient(sharing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(("dense", "frozen", "thin"))

    def seen() -> list[Tensor | None]:
        found: list[Any] = []
        handles = [block.k.register_forward_pre_hook(lambda module, args: found.append(args[0]))]
        handles += [block.v.register_full_backward_hook(lambda module, grads, _: found.append(grads[0]))]
        handles += [block.norm.register_full_backward_hook(lambda module, _, grads: found.append(grads[0]))]
        all_ = gradients(block)
        for handle in handles:
            handle.remove()
        return [*all_, *found]

    assert_close(seen(), alone(monkeypatch, seen))


@pytest.mark.parametrize("names", [("frozen",) * 3, ("dense",) * 3, ("thin", "frozen", "thin")])
def test_a_forward_pass_without_a_backward_pass_leaves_nothing(
    names: tuple[str, str, str], sharing: None
) -> None:
    block = make(names)
    hidden = numbers() * 1
    before = weakref.ref(hidden)
    outs = block(hidden)
    del hidden
    assert before() is not None  # the norm keeps it
    del outs
    assert before() is None


def test_a_failed_layer_leaves_nothing(sharing: None) -> None:
    block = make(("dense", "dense", "dense"))

    def fail() -> Tensor:
        raise MemoryError

    def run() -> "weakref.ref[Tensor]":
        hidden = numbers() * 1
        x = block.norm(hidden)
        block.q(x)
        with pytest.raises(MemoryError):
            call_sharing(FrozenProduct, x, None, fail)
        return weakref.ref(hidden)

    assert run()() is None


def test_threads_know_nothing_of_each_other(sharing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    block = make(("dense", "frozen", "thin"))
    expected = alone(monkeypatch, partial(gradients, block))
    found: list[Any] = []
    x = block.norm(numbers())
    first = block.q(x)
    thread = threading.Thread(target=lambda: found.extend([gradients(block), block.k(x)]))
    thread.start()
    thread.join()
    assert_close(found[0], expected)
    assert found[1].grad_fn.next_functions[0][0].name() == "NativeLayerNormBackward0"
    # The layer of the other thread is none of this one's chain.
    node = next(function for function, _ in first.grad_fn.next_functions if function is not None)
    assert node in [edge for edge, _ in block.v(x).grad_fn.next_functions[0][0].next_functions]


def test_without_gradients_nothing_is_linked(sharing: None) -> None:
    block = make(("dense", "frozen", "thin"))
    with torch.no_grad():
        block(numbers())
    assert shared_input._last.link is None
    block.norm.requires_grad_(False)
    outs = block(numbers().detach())  # nobody needs the gradient of x
    assert [out.requires_grad for out in outs] == [True, False, True]
    assert shared_input._last.link is None


FAMILIES: dict[str, PretrainedConfig] = {
    "LLaMA": LlamaConfig(**TINY),
    "norms behind queries and keys": Qwen3Config(**TINY, head_dim=8),
    "attention beside the MLP": CohereConfig(**TINY),
}


@pytest.mark.parametrize("adapter", ["MoKA", "MoKA's dropout", "LoRA"])
@pytest.mark.parametrize("family", FAMILIES)
def test_models_share(family: str, adapter: str, sharing: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(FAMILIES[family]).requires_grad_(False)
    quantise_rest(model, "int8", False, torch.float32)  # frozen layers with products of the package
    if adapter == "LoRA":
        model = get_peft_model(
            model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        )
    else:
        config = MokaConfig(dropout=0.1 * (adapter != "MoKA"), start="zero_left")
        inject_adapter(model, config)
        for name, parameter in model.named_parameters():
            nn.init.normal_(parameter, std=0.1) if "moka_A" in name else None
    model.train()
    ids = torch.arange(24).view(2, 12) % TINY["vocab_size"]

    def gradients() -> list[Tensor | None]:
        torch.manual_seed(0)
        loss = model(input_ids=ids, labels=ids).loss
        return list(torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad]))

    calls: list[bool] = []
    add = shared_input.add_product_
    for module in ("moka_pl.ops.merged_forward", "moka_pl.backbone.quantization.stored"):
        monkeypatch.setattr(
            f"{module}.add_product_", lambda *args: (calls.append(args[0] is not None), add(*args))[1]
        )
    found, shared = gradients(), sum(calls)
    for one, other in zip(found, alone(monkeypatch, gradients), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()) + 1e-9)
    assert shared >= 2  # gate and up projection at least
    assert sum(calls) == shared
