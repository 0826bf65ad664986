"""The loss of every architecture is the one that transformers computes."""

import inspect

import pytest
import torch
import transformers as T
from shared.tiny import SIZES, build
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from moka_pl.backbone.checks import check_loss
from moka_pl.errors import BackboneError
from moka_pl.lm.own_loss import has_own_logits, has_plain_head, run_own_forward
from moka_pl.lm.scoring import score_tokens

GPT = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "initializer_range": 0.2}
HEAD = {"head_dim": 8, "query_pre_attn_scalar": 8}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 16}

#: A configuration, and whether its logits are its head's alone.
HEADS = {
    "plain": (T.LlamaConfig, SIZES, True),
    "tied": (T.LlamaConfig, SIZES | {"tie_word_embeddings": True}, True),
    "biased": (T.PhiConfig, SIZES, True),
    "biased, other names": (T.GPTJConfig, GPT | {"rotary_dim": 8}, True),
    "projected before the head": (T.OPTConfig, SIZES | OPT, True),
    "multiplied after the head": (T.CohereConfig, SIZES | {"logit_scale": 0.3}, False),
    "divided after the head": (T.GraniteConfig, SIZES | {"logits_scaling": 4.0}, False),
    "capped after the head": (T.Gemma2Config, SIZES | HEAD | {"final_logit_softcapping": 2.0}, False),
    "transformed before the head": (T.RobertaConfig, SIZES | {"is_decoder": True}, False),
    "scaled once, odd output": (
        T.Llama4TextConfig,
        SIZES | {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        False,
    ),
    "experts": (T.MixtralConfig, SIZES | {"num_local_experts": 2, "num_experts_per_tok": 1}, True),
}


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """Two rows of which the second ends early, (2, 9), with labels from the fourth token on."""
    ids = torch.randint(5, 96, (2, 9), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :3] = -100
    labels[1, 6:] = -100
    return ids, labels


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_and_its_gradient_are_transformers_own(head: str, batch: tuple) -> None:
    kind, options, plain = HEADS[head]
    model, (ids, labels) = build(kind(**options)), batch
    weight = next(p for n, p in model.named_parameters() if "layers.0" in n or ".h.0" in n or "layer.0" in n)
    expected = F.cross_entropy(model(input_ids=ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    for _ in range(2):  # a model that has not been looked at, and one that has
        loss = score_tokens(model, ids, labels).nll.mean()
        torch.testing.assert_close(loss, expected)
        gradients = [torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, expected)]
        assert gradients[1].abs().max() > 0
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(score_tokens(model, ids, labels).nll.mean(), expected.detach())
    assert has_plain_head(model) == plain
    assert has_own_logits(model) != plain
    check_loss(model, "model")


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (T.BartConfig(d_model=32, decoder_layers=1, decoder_ffn_dim=48, vocab_size=96), "a way that moka_pl"),
        (T.BertConfig(**SIZES, is_decoder=False), "lets tokens see later ones"),
    ],
    ids=["labels are not shifted", "not causal"],
)
def test_a_loss_that_is_computed_otherwise_is_refused_by_name(config: object, reason: str) -> None:
    model = build(config)
    with pytest.raises(BackboneError, match=reason) as caught:
        check_loss(model, "some/model")
    assert f"some/model ({type(model).__name__})" in str(caught.value)


def test_a_model_that_needs_other_inputs_is_refused_by_name() -> None:
    model = build(T.LlamaConfig(**SIZES))
    model.forward = lambda **_: (_ for _ in ()).throw(ValueError("needs\npixel_values"))
    with pytest.raises(BackboneError, match="cannot be run on a few tokens: ValueError: needs pixel_values"):
        check_loss(model, "some/model")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_said(value: float) -> None:
    model = build(T.LlamaConfig(**SIZES))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = value
    with pytest.raises(BackboneError, match="its weights hold NaN or inf"):
        check_loss(model, "some/model")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    for head in ("plain", "multiplied after the head", "experts"):
        kind, options, _ = HEADS[head]
        check_loss(build(kind(**options)).to(dtype), "model")


def test_looking_at_a_model_draws_no_random_number_and_changes_nothing() -> None:
    model = build(T.LlamaConfig(**SIZES, attention_dropout=0.5)).train()
    state, weights = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    run_own_forward(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(p, weights[n]) and p.grad is None for n, p in model.named_parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_tokens_with_a_meaning_of_their_own_are_not_tried() -> None:
    model = build(T.LlamaConfig(**SIZES))
    model.config.image_token_id = 7
    assert not {0, 1, 2, 7} & set(run_own_forward(model).ids.flatten().tolist())


TINY = SIZES | {
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "d_model": 32,
    "n_heads": 4,
    "n_layers": 2,
    "ffn_dim": 48,
    "decoder_layers": 2,
    "decoder_ffn_dim": 48,
    "decoder_attention_heads": 4,
    "encoder_layers": 1,
    "encoder_ffn_dim": 48,
    "encoder_attention_heads": 4,
    "n_positions": 64,
    "sliding_window": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "is_decoder": True,
    "state_size": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "mamba_expand": 1,
    "embedding_size": 32,
    "rotary_dim": 8,
    "query_pre_attn_scalar": 8,
    "lm_head_multiplier": 0.3,
    "logits_scaling": 4.0,
    "logit_scale": 0.3,
    "word_embed_proj_dim": 16,
    "final_logit_softcapping": 2.0,
}


@pytest.mark.slow
def test_every_architecture_has_its_own_loss_or_is_refused_in_one_line() -> None:
    """Over all of transformers' causal architectures that can be built tiny from the options above."""
    right, refused = [], []
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        kind = CONFIG_MAPPING[name]
        known = set(inspect.signature(kind.__init__).parameters) | set(
            getattr(kind, "__dataclass_fields__", {})
        )
        options = (
            {"text_config": TINY} if "text_config" in known else {k: TINY[k] for k in known & TINY.keys()}
        )
        try:
            config = AutoConfig.for_model(name, **options)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            if sum(p.numel() for p in empty.parameters()) > 500_000:
                continue
            model = build(config)
        except Exception:  # options that this architecture does not take together
            continue
        try:
            check_loss(model, name)
        except BackboneError as error:
            refused.append((name, str(error)))
            continue
        own = run_own_forward(model)
        with torch.no_grad():
            ours = score_tokens(model, own.ids, own.labels).nll.mean().item()
        assert ours == pytest.approx(own.loss, rel=1e-4), name
        right.append(name)
    assert len(right) > 80
    assert {"cohere", "falcon_h1", "gemma2", "granite", "llama", "opt", "phi"} <= set(right)
    assert {"bart", "marian", "pegasus"} <= {name for name, _ in refused}
    assert not any("\n" in message for _, message in refused)
