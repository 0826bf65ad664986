"""Differences between causal language models: the one place for a model's quirks.

If a model does not support a fast path, a function here says why, and its caller takes the ordinary path.
"""

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING

from moka_pl._compat import attention_implementation, supports_flash_attention
from moka_pl.lm.own_loss import has_own_logits

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUERY_VALUE = ["q_proj", "v_proj"]
"""What most families call the linear layers that make queries and values."""

#: Layers beside attention that make both in one, and carry a state along the tokens (Qwen3.5, Qwen3-Next).
_BESIDE = ("in_proj_qkv", "in_proj_qkvz")
#: What families without the usual names call them: low-rank ones (DeepSeek), and several in one (GPT, Phi-3).
_INSTEAD = (
    "q_b_proj",
    "kv_b_proj",
    "qkv_proj",
    "query_key_value",
    "c_attn",
    "Wqkv",
    "qkv",
    "query",
    "value",
    "q",
    "v",
)


def query_value_names(layers: Iterable[str]) -> list[str]:
    """Returns what a family calls the layers of queries and values; the usual names where none is known.

    For the families in its table, they are PEFT's.

    Args:
        layers: Full names of the model's linear layers.
    """
    ends = {name.rpartition(".")[2] for name in layers}
    known = [*QUERY_VALUE, *_BESIDE] if ends.issuperset(QUERY_VALUE) else [*QUERY_VALUE, *_INSTEAD, *_BESIDE]
    return [name for name in known if name in ends] or QUERY_VALUE


def decoder_inputs(model: "PreTrainedModel") -> set[str]:
    """Returns the names of what the model's decoder can be given (or the model, where that is run itself)."""
    run = model if has_own_logits(model) else model.get_decoder()
    return set(inspect.signature(run.forward).parameters)


def sliding_window(model: "PreTrainedModel") -> int | None:
    """Returns how many tokens the model's attention looks back; None without a bound."""
    return getattr(model.config.get_text_config(), "sliding_window", None)


def head_size(model: "PreTrainedModel") -> int:
    """Returns the entries of a query in one attention head."""
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def causal_unsupported_reason(
    model: "PreTrainedModel", *implementations: str, width: int | None = None
) -> str | None:
    """Returns why plain causal attention over all earlier positions would not be the model's, or None.

    Args:
        model: The model.
        *implementations: Names of what is to take the place of SDPA; the model may have one of them already.
        width: Most tokens a row, which a window may hold; None for any number.
    """
    current = attention_implementation(model)
    if current not in ("sdpa", *implementations):
        return f"attention is {current}"
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        return f"{type(model).__name__} uses a custom attention"
    window = sliding_window(model)
    if window is not None and (width is None or width > window):
        return "the model uses sliding-window attention"
    if getattr(model.config.get_text_config(), "attention_chunk_size", None) is not None:
        return "the model attends within chunks"
    return None


def flash_unsupported_reason(model: "PreTrainedModel") -> str | None:
    """Returns why causal attention of the flash kind, without dropout, would not be the model's, or None."""
    if not supports_flash_attention(model):
        return f"{type(model).__name__} does not support flash attention"
    if getattr(model.config.get_text_config(), "attention_dropout", 0.0):
        return "the model uses attention dropout"
    return None
