"""Fixtures that several test folders share."""

from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from moka_pl.adapters import moka_layers

VOCABULARY = 96


@pytest.fixture
def make_llama() -> Callable[..., LlamaForCausalLM]:
    """Builds tiny random LLaMA models (evaluating, float32); options go to ``LlamaConfig``."""

    def make(seed: int = 0, **options: object) -> LlamaForCausalLM:
        torch.manual_seed(seed)
        sizes = {
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
        return LlamaForCausalLM(LlamaConfig(**(sizes | options))).float().eval()

    return make


@pytest.fixture
def tiny_llama(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    """A tiny random LLaMA: 2 layers, hidden 32, 4 heads on 2 key-value heads, vocabulary 96, float32."""
    return make_llama()


@pytest.fixture
def token_ids() -> torch.Tensor:
    """Two sequences for ``tiny_llama``, (2, 7)."""
    return torch.randint(VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def randomize() -> Callable[..., None]:
    """Gives all factors and gates of a model or layer random non-zero values: nothing is tested at ΔW = 0."""

    def fill(module: nn.Module, seed: int = 1, std: float = 0.3) -> None:
        generator = torch.Generator().manual_seed(seed)
        layers = list(moka_layers(module).values())
        assert layers
        with torch.no_grad():
            for layer in layers:
                for name, parameter in layer.named_parameters():
                    if name.startswith("moka_"):
                        spread = 1.0 if name == "moka_gate" else std
                        parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
                assert layer.get_delta_weight().abs().max() > 0.01

    return fill
