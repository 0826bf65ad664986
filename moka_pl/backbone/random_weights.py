"""Models of known shapes with random weights, and a tokenizer over single bytes for them.

Models are built layer by layer, so that the whole is never held in full precision.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moka_pl.backbone.blocks.filling import fill
from moka_pl.backbone.blocks.frozen_tensors import BlockStore
from moka_pl.backbone.checks import read_config
from moka_pl.backbone.config import BackboneConfig
from moka_pl.errors import BackboneError
from moka_pl.utils import expanded

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

_LLAMA2: dict[str, Any] = {"vocab_size": 32000, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5}
_LLAMA3: dict[str, Any] = {
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama2-7b": _sizes(4096, 11008, 32, 32, 32, **_LLAMA2),
    # Sizes between LLaMA2-7B's with few divisors: most filters do not fit and are padded or cut.
    "llama2-7b-odd": _sizes(4112, 11048, 32, 16, 16, **_LLAMA2, head_dim=248),
    "llama2-13b": _sizes(5120, 13824, 40, 40, 40, **_LLAMA2),
    "llama2-70b": _sizes(8192, 28672, 80, 64, 8, **_LLAMA2),
    "llama3-8b": _sizes(4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama3-1b": _sizes(2048, 8192, 16, 32, 8, **_LLAMA3, tie_word_embeddings=True, head_dim=64),
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True),
    "tiny": _sizes(64, 128, 2, 4, 2, vocab_size=320, max_position_embeddings=512),
}


def shape_config(name: str) -> "PretrainedConfig":
    """Returns the transformers configuration of a named shape or of a folder's ``config.json``.

    Raises:
        BackboneError: If it is neither, or damaged.
    """
    from transformers import LlamaConfig

    if name in SHAPES:
        return LlamaConfig(**SHAPES[name])
    folder = expanded(name)
    if (folder / "config.json").is_file():
        return read_config(name, pretrained_model_name_or_path=str(folder))
    raise BackboneError(
        f"unknown shape {name!r} for weights: random; choose one of {', '.join(SHAPES)}, "
        "or give a folder with a config.json"
    )


def random_model(
    config: BackboneConfig,
    model: "PreTrainedModel",
    dtype: torch.dtype,
    device: torch.device,
    blocks: BlockStore | None = None,
) -> "PreTrainedModel":
    """Gives a causal language model random weights.

    Linear weights are normal with the configuration's ``initializer_range``; each is quantised as soon as it
    is drawn. The same seed gives the same weights on devices of one kind.

    Args:
        config: Backbone options.
        model: The model on the meta device, which is filled.
        dtype: Compute dtype.
        device: Where the model lives.
        blocks: Takes each block as soon as that is filled.

    Raises:
        BackboneError: If something of the model is neither known to be random nor computed.
    """
    shape = model.config
    generator = torch.Generator(device).manual_seed(config.seed)
    std = getattr(shape, "initializer_range", 0.02)

    def make(module: nn.Module, name: str, key: str, empty: torch.Tensor) -> torch.Tensor:
        if key == "bias" and isinstance(module, nn.Linear):
            return torch.zeros_like(empty, device=device)
        # Several experts' matrices may be one parameter; what is one-dimensional are norms.
        if empty.ndim > 1:
            drawn = torch.empty(empty.shape, dtype=dtype, device=device)
            return drawn.normal_(0, std, generator=generator)
        return torch.ones_like(empty, device=device)

    left = fill(model, config, dtype, device, make, blocks)
    if left is not None:
        raise BackboneError(
            f"{config.name} cannot be given random weights: nothing is known of {left} in "
            f"{type(model).__name__}; set weights: pretrained"
        )
    return model


_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """Returns a tokenizer with 256 bytes and four special tokens, and a ChatML chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<|pad|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: i for i, symbol in enumerate([*special, *symbols])}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=special[0],
        eos_token=special[1],
        additional_special_tokens=special[2:],
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer
