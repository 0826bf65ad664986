"""The loss by parts of the tokens is the loss of all logits, with its gradients."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.lm import head_loss
from moka_pl.lm.head_loss import nll_at_head
from moka_pl.lm.scoring import score_tokens


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of three tokens, on a CPU too."""
    monkeypatch.setattr(head_loss, "_MOST_ON_CPU", 0)
    monkeypatch.setattr(head_loss, "_LOGITS", 1)
    monkeypatch.setattr(head_loss, "_FEWEST", 3)
    monkeypatch.setattr(head_loss, "_FEWEST_ADAPTED", 3)


def losses(head: nn.Module, hidden: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), wanted, reduction="none")


def assert_same(
    head: nn.Module, hidden: Tensor, wanted: Tensor, compute: Callable[..., Tensor] = nll_at_head
) -> None:
    """Loss and gradients, each token's weighted by another number."""
    results = []
    inputs = [hidden.requires_grad_(), *(p for p in head.parameters() if p.requires_grad)]
    for function in (compute, losses):
        nll = function(head, hidden, wanted)
        weights = torch.linspace(-1, 2, len(hidden))
        results.append((nll.detach(), *torch.autograd.grad((nll * weights).sum(), inputs)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@settings(max_examples=20, deadline=None)
@given(
    tokens=st.integers(0, 9),
    vocabulary=st.integers(1, 40),
    size=st.integers(1, 9),
    bias=st.booleans(),
    ignored=st.integers(0, 9),
)
def test_a_frozen_linear_head(tokens: int, vocabulary: int, size: int, bias: bool, ignored: int) -> None:
    torch.manual_seed(tokens + 10 * vocabulary)
    head = nn.Linear(6, vocabulary, bias=bias).requires_grad_(False)
    wanted = torch.randint(vocabulary, (tokens,))
    wanted[ignored:] = head_loss.IGNORE_INDEX

    def by_parts(head: Any, hidden: Tensor, wanted: Tensor) -> Tensor:
        nll: Tensor = head_loss._LinearNll.apply(hidden, head.weight, head.bias, wanted, size)
        return nll

    assert_same(head, 3 * torch.randn(tokens, 6), wanted, by_parts)


def test_the_head_sees_parts_of_about_one_size(in_parts: None) -> None:
    class Head(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            sizes.append(len(x))
            return super().forward(x)

    sizes: list[int] = []
    head = Head(4, 7)
    nll_at_head(head, torch.randn(8, 4), torch.arange(7).repeat(2)[:8]).sum().backward()
    assert sizes == [3, 3, 2, 2, 3, 3]  # again in the backward pass, from the last to the first


@pytest.mark.parametrize("trained", [False, True])
def test_a_token_without_label_has_no_gradient_whatever_its_logits_are(trained: bool, in_parts: None) -> None:
    head = nn.Linear(4, 7, bias=False).requires_grad_(trained)
    hidden = torch.ones(2, 4)
    hidden[1] = torch.nan
    wanted = torch.tensor([3, head_loss.IGNORE_INDEX])
    logits = head(hidden).detach().requires_grad_()
    (grad,) = torch.autograd.grad(head_loss._LogitsNll.apply(logits, wanted, 2).sum(), logits)  # type: ignore[no-untyped-call]
    assert (grad[0] != 0).all()
    assert (grad[1] == 0).all()
    hidden.requires_grad_()
    (grad,) = torch.autograd.grad(nll_at_head(head, hidden, wanted).sum(), hidden)
    assert (grad[0] != 0).all()
    assert (grad[1] == 0).all()


def test_parts_are_of_about_one_size() -> None:
    assert head_loss.part_size(0, 10) == 1
    assert head_loss.part_size(600, 2**25) == 300
    assert head_loss.part_size(600, 2**25, adapted=True) == 600
    assert head_loss.part_size(4096, 2**15) == 1024


@pytest.mark.parametrize("name", ["trained", "MoKA", "LoRA", "dropout"])
def test_a_head_that_is_trained_or_adapted(name: str, in_parts: None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.lm_head = nn.Linear(8, 20, bias=False).requires_grad_(name == "trained")
    if name in ("MoKA", "dropout"):
        options: dict[str, Any] = {"target_modules": ["lm_head"], "components": 2}
        inject_adapter(model, MokaConfig(**options, dropout=0.5 if name == "dropout" else 0.0))
    if name == "LoRA":
        peft = pytest.importorskip("peft")
        inject_adapter(model, peft.LoraConfig(r=2, target_modules=["lm_head"]))
    for parameter in (p for p in model.parameters() if p.requires_grad):
        nn.init.normal_(parameter, std=0.3)
    hidden, wanted = torch.randn(8, 8), torch.randint(20, (8,))
    if name != "dropout":
        assert_same(model.lm_head, hidden, wanted)
        return
    model.train()
    hidden.requires_grad_()
    torch.manual_seed(1)
    nll = nll_at_head(model.lm_head, hidden, wanted)
    (grad,) = torch.autograd.grad(nll.sum(), hidden)
    torch.manual_seed(1)
    parts = [losses(model.lm_head, h, w) for h, w in zip(hidden.split(3), wanted.split(3), strict=True)]
    (expected,) = torch.autograd.grad(torch.cat(parts).sum(), hidden)
    torch.testing.assert_close(grad, expected)


def test_hooks_on_a_head_see_all_tokens(in_parts: None) -> None:
    head, sizes = nn.Linear(4, 7), []
    head.register_forward_hook(lambda _, args, out: sizes.append(len(out)))
    nll_at_head(head, torch.randn(8, 4), torch.zeros(8, dtype=torch.long))
    assert sizes == [8]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float64_as_whole_logits(dtype: torch.dtype, in_parts: None) -> None:
    torch.manual_seed(0)
    head = nn.Linear(16, 40, bias=False, dtype=dtype).requires_grad_(False)
    hidden, wanted = torch.randn(8, 16, dtype=dtype).requires_grad_(), torch.randint(40, (8,))
    exact = hidden.detach().double().requires_grad_()
    F.cross_entropy(F.linear(exact, head.weight.double()), wanted, reduction="none").sum().backward()
    assert exact.grad is not None
    errors = [
        (torch.autograd.grad(function(head, hidden, wanted).sum(), hidden)[0] - exact.grad).norm()
        for function in (nll_at_head, losses)
    ]
    assert errors[0] <= 1.2 * errors[1] < 0.02 * exact.grad.norm()


def test_autocast_computes_the_product_in_its_dtype(in_parts: None) -> None:
    head = nn.Linear(16, 40, bias=False).requires_grad_(False)
    hidden, wanted = torch.randn(8, 16).requires_grad_(), torch.randint(40, (8,))
    results = []
    for function in (nll_at_head, losses):
        with torch.autocast("cpu", torch.bfloat16):
            nll = function(head, hidden, wanted)
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), hidden)))
    assert results[0][0].dtype == torch.float32
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)


def test_a_model_s_step_by_parts_is_its_step(in_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackboneConfig("tiny", weights="random", quantization="none")
    model = load_backbone(config).model
    inject_adapter(model, MokaConfig(components=2, target_modules=["q_proj", "lm_head"]))
    ids = torch.arange(3, 25).view(2, 11)
    labels = ids.where(ids % 5 != 0, -100)
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for most in (0, 2**28):
        monkeypatch.setattr(head_loss, "_MOST_ON_CPU", most)
        nll = score_tokens(model, ids, labels).nll
        results.append((nll.detach(), *torch.autograd.grad(nll.sum(), trained)))
        with torch.no_grad():
            torch.testing.assert_close(score_tokens(model, ids, labels).nll, results[-1][0])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
