"""Configurations of known model shapes, for random weights."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from moka_pl.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

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
    "llama3-8b": _sizes(4096, 14336, 32, 32, 8, **_LLAMA3),
    "llama3-1b": _sizes(2048, 8192, 16, 32, 8, **_LLAMA3, tie_word_embeddings=True, head_dim=64),
    "smollm2-135m": _sizes(576, 1536, 30, 9, 3, vocab_size=49152, tie_word_embeddings=True),
    "tiny": _sizes(64, 128, 2, 4, 2, vocab_size=320, max_position_embeddings=512),
}


def shape_config(name: str) -> "PretrainedConfig":
    """Returns the transformers configuration of a named shape or of a folder's ``config.json``.

    Args:
        name: A key of :data:`SHAPES` or a folder.

    Returns:
        The configuration.

    Raises:
        BackboneError: If it is neither.
    """
    from transformers import AutoConfig, LlamaConfig

    if name in SHAPES:
        return LlamaConfig(**SHAPES[name])
    folder = Path(name).expanduser()
    if (folder / "config.json").is_file():
        return AutoConfig.from_pretrained(folder)
    raise BackboneError(
        f"weights: random knows no shape {name!r}; choose one of {', '.join(SHAPES)}, "
        "or give a folder with a config.json"
    )
