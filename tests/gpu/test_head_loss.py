"""The loss by parts of the tokens on a GPU; run with ``pytest -m gpu``."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.lm import head_loss
from moka_pl.lm.cuda_graphs import PATIENCE, StepCapture, fix_size
from moka_pl.lm.head_loss import nll_at_head
from moka_pl.lm.scoring import score_tokens

pytestmark = pytest.mark.gpu

TOKENS, WIDTH, VOCABULARY = 8192, 64, 50_000


@pytest.mark.parametrize("adapted", [False, True])
def test_a_part_of_the_logits_is_held_at_a_time(adapted: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential()
    model.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False, device="cuda", dtype=torch.bfloat16)
    model.requires_grad_(False)
    if adapted:
        inject_adapter(model, MokaConfig(target_modules=["lm_head"], components=2))
    hidden = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    wanted = torch.randint(VOCABULARY, (TOKENS,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    nll = nll_at_head(model.lm_head, hidden, wanted)
    (grad,) = torch.autograd.grad(nll.sum(), hidden)
    taken = torch.cuda.max_memory_allocated() - before
    assert taken < (0.55 if adapted else 0.2) * 4 * TOKENS * VOCABULARY
    expected = F.cross_entropy(model.lm_head(hidden).float(), wanted, reduction="none")
    torch.testing.assert_close(nll, expected, rtol=1e-3, atol=1e-3)
    (wanted_grad,) = torch.autograd.grad(expected.sum(), hidden)
    assert (grad.float() - wanted_grad.float()).norm() < 2e-2 * wanted_grad.float().norm()


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_a_replayed_step_computes_its_loss_by_parts(targets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "_LOGITS", 1)
    monkeypatch.setattr(head_loss, "_FEWEST", 100)
    monkeypatch.setattr(head_loss, "_FEWEST_ADAPTED", 100)
    config: Any = {"weights": "random", "compute_dtype": "float32", "quantization": "none"}
    model = load_backbone(BackboneConfig("tiny", **config), "cuda").model
    inject_adapter(model, MokaConfig(target_modules=targets, components=2))
    params = [p for p in model.train().parameters() if p.requires_grad]
    ids = torch.randint(3, 320, (4, 64), device="cuda")
    capture = StepCapture(model)
    for _ in range(PATIENCE + 2):
        loss = capture(fix_size({"input_ids": ids, "labels": ids}))
        found = torch.autograd.grad(loss, params)
    assert capture.graphs == 1
    monkeypatch.setattr(head_loss, "_LOGITS", 2**25)
    expected_loss = score_tokens(model, ids, ids).nll.sum()
    expected = torch.autograd.grad(expected_loss, params)
    torch.testing.assert_close(loss.detach(), expected_loss.detach(), rtol=1e-4, atol=0)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max() + 1e-6))
