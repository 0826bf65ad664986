"""Attention without a mask is the model's own, or is not used."""

from typing import Any

import pytest
import torch

from moka_pl._compat import attention_implementation
from moka_pl.lm import causal as module
from moka_pl.lm.architecture import causal_unsupported_reason
from moka_pl.lm.causal import CAUSAL, causal, without_waiting
from moka_pl.lm.scoring import score_tokens
from moka_pl.studies.architectures.families import FAMILIES, tiny_model

FAMILY = {family.name: family for family in FAMILIES}


SAME = {"LLaMA 3": True, "GPT-2": True, "Qwen3.5": True, "Falcon": False, "Gemma 3": False, "LLaMA 4": False}


@pytest.mark.parametrize(("name", "same"), SAME.items())
def test_a_model_is_tried_before_it_goes_without_masks(name: str, same: bool) -> None:
    model: Any = tiny_model(FAMILY[name]).train()
    before = attention_implementation(model)
    assert module._computes_the_same(model) is same
    assert attention_implementation(model) == before
    assert all(layer.training for layer in model.modules())
    if same:
        ids = torch.arange(3, 63).view(2, 30)
        model.eval()
        expected = score_tokens(model, ids, ids).nll
        with causal(model):
            torch.testing.assert_close(score_tokens(model, ids, ids).nll, expected)


def test_attention_within_chunks_is_not_causal_attention() -> None:
    model: Any = tiny_model(FAMILY["LLaMA 4"])
    assert "chunks" in (causal_unsupported_reason(model, CAUSAL) or "")


def test_rows_within_a_sliding_window_need_no_mask() -> None:
    model: Any = tiny_model(FAMILY["Gemma 3"]).eval()
    window = model.config.sliding_window
    assert causal_unsupported_reason(model, CAUSAL, width=window) is None
    assert (
        causal_unsupported_reason(model, CAUSAL, width=window + 1)
        == "the model uses sliding-window attention"
    )
    for width, same in ((window, True), (2 * window, False)):
        ids = torch.arange(3, 3 + width)[None] % model.config.vocab_size
        expected = score_tokens(model, ids, ids).nll
        with causal(model):
            assert torch.allclose(score_tokens(model, ids, ids).nll, expected, atol=1e-5) is same


def test_a_mask_is_not_passed_over_in_silence(tiny_llama: Any) -> None:
    tiny_llama.eval()
    with causal(tiny_llama), pytest.raises(RuntimeError, match="mask"):
        tiny_llama(input_ids=torch.ones(1, 4, dtype=torch.long), attention_mask=torch.ones(1, 1, 4, 4).bool())
    assert attention_implementation(tiny_llama) == "sdpa"


def test_a_cpu_has_nothing_to_wait_for(tiny_llama: Any) -> None:
    with without_waiting(tiny_llama):
        assert attention_implementation(tiny_llama) == "sdpa"
    assert tiny_llama.get_decoder() not in module._same
