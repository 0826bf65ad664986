"""Attention that separates the examples of a packed row, and the SDPA behind it.

On a GPU in 16 bits a variable-length attention computes each example on its own. Elsewhere the model's usual
attention gets a mask, which transformers builds from position ids that begin anew.
"""

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moka_pl._compat import attention_implementation
from moka_pl.errors import ConfigError
from moka_pl.lm.architecture import (
    causal_unsupported_reason,
    decoder_inputs,
    flash_unsupported_reason,
    head_size,
    sliding_window,
)
from moka_pl.lm.scoring import logits_at

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VARLEN = "moka_varlen"
"""Name of the attention implementation that is registered with transformers."""

_HALF = (torch.float16, torch.bfloat16)


class PackedAttention:
    """Prepares a model for packed batches and makes its inputs of each.

    A model that can use the variable-length attention gets it as its attention implementation; batches that
    are not packed are computed as before.

    Attributes:
        unsupported_reason: Why there is no variable-length attention; None where it is used.
        explicit: Whether the mask is given to the model, which does not build it of position ids.

    Raises:
        ConfigError: If the model mixes packed examples.
    """

    def __init__(self, model: "PreTrainedModel") -> None:
        if "position_ids" not in decoder_inputs(model):
            raise ConfigError(
                f"{type(model).__name__} takes no position ids, which packing needs; set packing: false in "
                "the data"
            )
        self.unsupported_reason = _varlen_unsupported_reason(model)
        self._flash = (attention_implementation(model) or "").startswith("flash_attention")
        if self.unsupported_reason is None:
            _register()
            model.set_attn_implementation(VARLEN)
        self.explicit = False
        self._model = model
        current = attention_implementation(model)
        apart = self._stay_apart()
        # A mask of one's own would take the place of a sliding window.
        if not apart and current in ("sdpa", "eager") and sliding_window(model) is None:
            self.explicit = True
            apart = self._stay_apart()
        if not apart:
            raise ConfigError(
                f"{type(model).__name__} with attention {current!r} lets packed examples attend to each "
                "other; set packing: false in the data"
                + ("" if current in ("sdpa", "eager") else ", or backbone.attention: sdpa")
            )

    def __str__(self) -> str:
        if self.unsupported_reason is None:
            return "variable-length attention"
        if self._flash:
            return "variable-length flash attention"
        return f"block-diagonal attention mask ({self.unsupported_reason})"

    def inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the model's inputs beside the token ids, for what ``collate_packs`` returns."""
        inputs: dict[str, Any] = {"position_ids": batch["position_ids"]}
        if self.unsupported_reason is None or self._flash:
            make = varlen_inputs if self.unsupported_reason is None else segment_inputs
            inputs |= make(batch["segment_starts"], batch["longest_segment"])
        if self.explicit:
            segments = (batch["position_ids"] == 0).cumsum(1)  # (B, T)
            inputs["attention_mask"] = block_mask(self._model, segments)
        return inputs

    def _stay_apart(self) -> bool:
        """Tries whether an example's logits stay the same with another one before it."""
        model = self._model
        device = model.get_input_embeddings().weight.device
        batch = {
            "position_ids": torch.arange(4, device=device).repeat(2)[None],  # (1, 8)
            "segment_starts": torch.tensor([0, 4, 8], dtype=torch.int32, device=device),
            "longest_segment": 4,
        }
        ids = torch.arange(8, device=device)[None] % model.get_input_embeddings().weight.shape[0]  # (1, 8)
        other = ids.clone()
        other[:, :4] = ids[:, :4].flip(1)
        column = torch.arange(4, 8, device=device)
        training = model.training
        model.eval()
        try:
            with torch.no_grad():
                first, second = (
                    logits_at(
                        model, column * 0, column, input_ids=tokens, **self.inputs(batch)
                    ).float()  # (4, V)
                    for tokens in (ids, other)
                )
        finally:
            model.train(training)
        return bool((first - second).abs().max() <= 1e-2 * first.abs().max())


def varlen_inputs(starts: Tensor, longest: int) -> dict[str, Any]:
    """Returns what a model with the variable-length attention reads beside token and position ids.

    Args:
        starts: Where the segments begin in the flattened batch, and the end of the last, shape (S + 1,),
            int32.
        longest: Tokens of the longest segment, or more.
    """
    # A mask of four dimensions is taken for a finished one: none is built, at a cost that grows with the
    # square of the row, and the GPU need not be waited for.
    mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=starts.device)
    return {"attention_mask": mask, **segment_inputs(starts, longest)}


def segment_inputs(starts: Tensor, longest: int) -> dict[str, Any]:
    """Returns the segments of a packed batch under the names of transformers (see :func:`varlen_inputs`)."""
    lengths = {"max_length_q": longest, "max_length_k": longest}
    return {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, **lengths}


def block_mask(model: "PreTrainedModel", segments: Tensor) -> Tensor:
    """Which token sees which: those before it that belong to the prompt or to its own option.

    Args:
        model: Its kind of attention decides the form.
        segments: 0 for a prompt, which all see, k for option or example k, -1 for padding, shape (I, S).

    Returns:
        Shape (I, 1, S, S): True where a token is seen; for eager attention 0 there, else the lowest number.
    """
    size = segments.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segments.device).tril()
    keys, queries = segments[:, None, :], segments[:, :, None]
    seen = (causal & ((keys == 0) | (keys == queries)))[:, None]  # (I, 1, S, S)
    if attention_implementation(model) != "eager":
        return seen
    zero = torch.zeros((), dtype=model.dtype, device=segments.device)
    return zero.masked_fill(~seen, torch.finfo(model.dtype).min)


def _varlen_unsupported_reason(model: "PreTrainedModel") -> str | None:
    """Why the variable-length attention cannot be used, or None."""
    reason = causal_unsupported_reason(model, VARLEN) or flash_unsupported_reason(model)
    if reason is not None:
        return reason
    weight, size = model.get_input_embeddings().weight, head_size(model)
    if weight.device.type != "cuda":
        return "variable-length attention needs a GPU"
    if weight.dtype not in _HALF:
        return f"variable-length attention needs bfloat16 or float16, not {str(weight.dtype)[6:]}"
    capability = torch.cuda.get_device_capability(weight.device)
    if capability < (8, 0):
        return "variable-length attention needs a GPU of compute capability 8.0 or higher"
    # Consumer cards lack the shared memory for the backward pass of larger heads.
    largest = 256 if capability[0] >= 9 or capability == (8, 0) else 192
    if size % 8 or size > largest:
        return f"variable-length attention does not support head size {size}"
    return None


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(VARLEN, varlen_attention)
    # Batches that are not packed are masked and computed as by SDPA.
    AttentionMaskInterface.register(VARLEN, sdpa_mask)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends causally inside each segment of the flattened batch; by SDPA where no segments are given.

    Args:
        module: The attention layer.
        query: Queries, shape (B, H, T, d).
        key: Keys, shape (B, K, T, d); H is a multiple of K.
        value: Values, shape (B, K, T, d).
        attention_mask: For SDPA only.
        dropout: For SDPA only.
        scaling: Factor on the scores; None takes 1 / √d.
        **kwargs: ``cu_seq_lens_q`` (S + 1,), int32, and ``max_length_q`` of a packed batch, and what else
            the model hands to its attention.

    Returns:
        The attended values, shape (B, T, H, d), and None for the weights.
    """
    starts, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if starts is None or longest is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        kwargs |= {"dropout": dropout, "scaling": scaling}
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
        return out, None
    from torch.nn.attention.varlen import varlen_attn

    batch, heads, length, size = query.shape
    dtype = value.dtype if value.dtype in _HALF else torch.bfloat16
    queries, keys, values = (x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (query, key, value))
    options: dict[str, Any] = {"window_size": (-1, 0), "scale": scaling}
    if key.shape[1] != heads:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            options["enable_gqa"] = True
        else:
            keys, values = (x.repeat_interleave(heads // key.shape[1], dim=1) for x in (keys, values))
    out = varlen_attn(queries, keys, values, starts, starts, longest, longest, **options)
    assert isinstance(out, Tensor)  # (B * T, H, d)
    return out.view(batch, length, heads, size).to(query.dtype), None
