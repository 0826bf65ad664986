"""Which checkpointed layers keep the state of random generators."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CTRLConfig, CTRLLMHeadModel

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.errors import ConfigError
from moka_pl.lm.checkpointing import checkpoint_layers, draws, is_checkpointed
from moka_pl.lm.scoring import score_tokens


def test_a_layer_draws_where_something_drops_out(tiny_llama: Any) -> None:
    assert not draws(tiny_llama)
    tiny_llama.model.layers[1].mlp.act_fn = nn.Sequential(nn.SiLU(), nn.Dropout(0.0))
    assert not draws(tiny_llama)
    tiny_llama.model.layers[1].mlp.act_fn[1].p = 0.1
    assert draws(tiny_llama)


@pytest.mark.parametrize(
    "name", ["attention_dropout", "resid_pdrop", "drop_path_rate", "router_jitter_noise"]
)
def test_options_of_a_model_tell_what_it_draws(tiny_llama: Any, name: str) -> None:
    setattr(tiny_llama.config, name, 0.0)
    assert not draws(tiny_llama)
    setattr(tiny_llama.config, name, 0.1)
    assert draws(tiny_llama)


@pytest.mark.parametrize(
    ("kind", "option"),
    [("LoraConfig", "lora_dropout"), ("LoKrConfig", "module_dropout"), ("OFTConfig", "module_dropout")],
)
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_methods_of_peft_tell_what_they_draw(tiny_llama: Any, kind: str, option: str, share: float) -> None:
    peft = pytest.importorskip("peft")
    inject_adapter(tiny_llama, getattr(peft, kind)(target_modules=["q_proj"], **{option: share}))
    assert draws(tiny_llama) is (share > 0)


def test_dropout_is_the_same_when_a_layer_is_computed_again(tiny_llama: Any, randomize: Any) -> None:
    inject_adapter(tiny_llama, MokaConfig(components=2, dropout=0.5))
    randomize(tiny_llama)
    params = [p for p in tiny_llama.train().parameters() if p.requires_grad]
    ids = torch.arange(3, 25).view(2, 11)
    results = []
    for checkpointing in (False, True):
        if checkpointing:
            checkpoint_layers(tiny_llama)
        torch.manual_seed(0)
        results.append(torch.autograd.grad(score_tokens(tiny_llama, ids, ids).nll.sum(), params))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("error")
def test_nothing_is_said_of_it(tiny_llama: Any) -> None:
    assert not is_checkpointed(tiny_llama)
    checkpoint_layers(tiny_llama)
    assert is_checkpointed(tiny_llama)


def test_a_model_that_cannot_is_refused() -> None:
    model = CTRLLMHeadModel(CTRLConfig(vocab_size=20, n_positions=8, n_embd=8, dff=8, n_layer=1, n_head=2))
    with pytest.raises(ConfigError, match=r"transformers has none for CTRLLMHeadModel; set it to false"):
        checkpoint_layers(model)
