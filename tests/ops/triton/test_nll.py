"""The kernel of the loss, under Triton's interpreter where there is no GPU (see conftest)."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

pytest.importorskip("triton")
kernels = pytest.importorskip("moka_pl.ops.triton")
nll_of_logits = kernels.nll_of_logits

IGNORED = -100


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.detach(), atol=1e-5, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 6), st.integers(1, 70), st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_loss_and_gradient_are_those_of_float64(tokens, vocabulary, scaled, in_place, seed) -> None:
    torch.manual_seed(seed)
    logits = 5 * torch.randn(tokens, vocabulary)
    wanted = torch.randint(vocabulary, (tokens,))
    wanted[::3] = IGNORED
    factor = torch.randn(tokens) if scaled else None
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, wanted, ignore_index=IGNORED, reduction="none")
    upstream = torch.ones(tokens).double() if factor is None else factor.double()
    (gradient,) = torch.autograd.grad(expected, exact, upstream)
    assert_close(nll_of_logits(logits, wanted, IGNORED), expected)
    errors = logits if in_place else torch.empty_like(logits)
    found = nll_of_logits(logits, wanted, IGNORED, errors, factor)
    assert_close(found, expected)
    assert_close(errors, gradient)


def test_several_blocks_of_logits_are_one_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moka_pl.ops.triton.nll._BLOCK", 16)
    torch.manual_seed(0)
    logits = 30 * torch.randn(5, 75)
    logits[:, :40] = -math.inf  # whole blocks without a token that can be
    logits[3, 2] = 1.0
    wanted = torch.tensor([41, 74, 50, 2, 60])
    exact = logits.double().requires_grad_()
    expected = F.cross_entropy(exact, wanted, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    found = nll_of_logits(logits, wanted, IGNORED, logits)
    assert_close(found, expected)
    assert_close(logits, gradient)


def test_half_precision_is_rounded_once() -> None:
    torch.manual_seed(0)
    logits = (3 * torch.randn(4, 50)).bfloat16()
    wanted = torch.randint(50, (4,))
    exact = logits.float().requires_grad_()
    expected = F.cross_entropy(exact, wanted, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), exact)
    found = nll_of_logits(logits, wanted, IGNORED, logits)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(logits.float(), gradient, atol=4e-3, rtol=8e-3)  # the interpreter cuts off


def test_one_factor_may_stand_for_all_tokens() -> None:
    torch.manual_seed(0)
    logits, wanted = torch.randn(4, 9), torch.randint(9, (4,))
    alone, together = torch.empty_like(logits), torch.empty_like(logits)
    nll_of_logits(logits, wanted, IGNORED, alone, torch.full((4,), 0.5))
    nll_of_logits(logits, wanted, IGNORED, together, torch.tensor(0.5).expand(4))  # as a sum's gradient is
    assert torch.equal(alone, together)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_shows(value: float) -> None:
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    found = nll_of_logits(logits, torch.tensor([0, 0]), IGNORED, logits)
    assert found.isfinite().tolist() == [True, False]
    assert logits.isfinite().all(-1).tolist() == [True, False]
