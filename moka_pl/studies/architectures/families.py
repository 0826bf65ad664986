"""Tiny random models of the usual families, written to folders as transformers writes them.

Scales, caps and biases have values that change the result, so that one who passes them by computes another
loss. The vocabulary is the byte tokenizer's.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moka_pl.backbone.random_weights import byte_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_VOCABULARY = 264
_TOKENS = {"vocab_size": _VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
_SIZES: dict[str, Any] = {
    **_TOKENS,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # The usual 0.02 would make so small a network almost blind to its attention layers.
    "initializer_range": 0.2,
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
_QWEN_MOE = _EXPERTS | {"num_experts": 4, "shared_expert_intermediate_size": 64}
#: A state carried along in one layer, and attention in the other.
_HYBRID: dict[str, Any] = {
    "initializer_range": 0.1,  # so deep a recurrence magnifies rounding
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
_LATENT = _EXPERTS | {
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 64,
    "q_lora_rank": 64,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_group": 2,
    "topk_group": 1,
    "routed_scaling_factor": 1.7,
    "tie_word_embeddings": False,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        name: Its name.
        model_type: What transformers calls it.
        options: Options of its configuration, beside or in place of the common sizes.
        sizes: The common sizes; families before LLaMA name them otherwise.
    """

    name: str
    model_type: str
    options: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=lambda: _SIZES)


_GPT2 = _TOKENS | {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.2}

FAMILIES = (
    Family("LLaMA 2", "llama", {"num_key_value_heads": 4}),
    Family("LLaMA 3", "llama", {"rope_parameters": _LLAMA3, "tie_word_embeddings": True}),
    Family(
        "LLaMA 4",
        "llama4_text",
        {
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "intermediate_size_mlp": 128,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 64,
            "attn_scale": 0.2,
            "floor_scale": 4,
        },
    ),
    Family("Mistral", "mistral", {"sliding_window": 64}),
    Family("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    Family("Qwen2, Qwen2.5", "qwen2"),
    Family("Qwen2 MoE", "qwen2_moe", _QWEN_MOE | {"norm_topk_prob": False, "mlp_only_layers": [0]}),
    Family("Qwen3", "qwen3", {"head_dim": 16}),
    Family("Qwen3 MoE", "qwen3_moe", _QWEN_MOE | {"head_dim": 16}),
    Family("Qwen3.5", "qwen3_5_text", _HYBRID),
    Family("Qwen3.5 MoE", "qwen3_5_moe_text", _HYBRID | _QWEN_MOE),
    Family("Gemma", "gemma", {"head_dim": 16}),
    Family(
        "Gemma 2",
        "gemma2",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 5,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
            "sliding_window": 64,
        },
    ),
    Family("Gemma 3", "gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 5, "sliding_window": 64}),
    Family("Phi-3, Phi-4", "phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    Family("GPT-NeoX, Pythia", "gpt_neox", {"use_parallel_residual": True, "attention_bias": True}),
    Family("GPT-2", "gpt2", {"scale_attn_by_inverse_layer_idx": True}, _GPT2),
    Family("OPT", "opt", {"ffn_dim": 128, "word_embed_proj_dim": 128}),
    Family("Falcon", "falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False}),
    Family("OLMo 2", "olmo2"),
    Family("Cohere", "cohere", {"logit_scale": 0.3, "use_qk_norm": True}),
    Family(
        "Granite",
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.2,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.6,
        },
    ),
    Family("StableLM", "stablelm", {"use_qkv_bias": True, "qk_layernorm": True}),
    Family("SmolLM3", "smollm3", {"no_rope_layers": [1, 0]}),
    Family("DeepSeek-V2", "deepseek_v2", _LATENT | {"topk_method": "group_limited_greedy"}),
    Family("DeepSeek-V3", "deepseek_v3", _LATENT | {"norm_topk_prob": True}),
)


def tiny_model(family: Family) -> "PreTrainedModel":
    """Builds a family's model, float32, evaluating, whose norms and biases are random, too.

    Args:
        family: The family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(family.model_type, **(family.sizes | family.options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1 and not name.endswith("A_log"):
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
        for module in model.modules():
            bias = getattr(module, "e_score_correction_bias", None)
            if isinstance(bias, torch.Tensor) and not isinstance(bias, nn.Parameter):
                bias.normal_(0, 0.2)
    return model.eval()


def write_family(family: Family, folder: Path) -> Path:
    """Saves a family's model and a tokenizer, as a user has them; returns the folder.

    Args:
        family: The family.
        folder: The folder to write.
    """
    model = tiny_model(family)
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
