"""What our own kinds of attention have in common: whom they fit, and SDPA behind them."""

from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def attention_obstacle(model: "PreTrainedModel", own: str) -> str | None:
    """Why plain causal attention over all earlier positions would not be the model's, if it would not.

    Args:
        model: A causal language model.
        own: Name of the attention that is to take SDPA's place, which the model may have already.
    """
    config = model.config.get_text_config()
    if model.config._attn_implementation not in ("sdpa", own):
        return f"attention is {model.config._attn_implementation}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return f"{type(model).__name__} needs an attention of its own"
    if getattr(config, "sliding_window", None) is not None:
        return "the model's attention has a sliding window"
    return None


def sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Transformers' SDPA: (B, H, T, d) queries, (B, K, T, d) keys and values to (B, T, H, d), and None."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return out, None
