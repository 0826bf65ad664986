"""Sizes of tiny models of any architecture, and how to build one."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

VOCABULARY = 96
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    # The usual 0.02 would make so small a network almost blind to its attention layers.
    "initializer_range": 0.2,
}
SIZES = SHAPE | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def build(config: PretrainedConfig) -> Any:
    """A random causal language model, evaluating, float32."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
