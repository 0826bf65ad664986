"""Causal attention without a mask, and without a look at the batch.

transformers builds masks from position ids, for which the CPU waits until the GPU has computed them. Where
padding stands on the right alone no mask is needed: every position sees all before it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moka_pl._compat import attention_implementation, set_attention
from moka_pl.lm.architecture import causal_unsupported_reason

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CAUSAL = "moka_causal"
"""Name of the attention implementation that is registered with transformers."""

#: Largest relative difference of the last hidden states, ‖without mask - with‖ / ‖with‖.
_TOLERANCE = 1e-2
#: Whether decoders compute the same without a mask, as they were tried.
_same: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


@contextmanager
def causal(model: "PreTrainedModel") -> Iterator[None]:
    """Has a model attend by SDPA that takes no mask.

    Only for batches that are padded on the right, and for models of which
    :func:`moka_pl.lm.architecture.causal_unsupported_reason` tells no reason against it.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(CAUSAL, _causal_attention)
    before = set_attention(model, CAUSAL)
    try:
        yield
    finally:
        set_attention(model, before)


@contextmanager
def without_waiting(model: "PreTrainedModel") -> Iterator[None]:
    """The same on a GPU, if the model, tried once, computes the same; else nothing changes."""
    on_gpu = model.get_input_embeddings().weight.device.type == "cuda"
    if not on_gpu or attention_implementation(model) != "sdpa" or not _computes_the_same(model):
        yield
        return
    with causal(model):
        yield


def _computes_the_same(model: "PreTrainedModel") -> bool:
    decoder = model.get_decoder()
    if decoder not in _same:
        _same[decoder] = causal_unsupported_reason(model, CAUSAL) is None and _tried(model)
    return _same[decoder]


@torch.no_grad()
def _tried(model: "PreTrainedModel") -> bool:
    """Whether a decoder gives the same hidden states for two rows of a few tokens."""
    weight = model.get_input_embeddings().weight
    ids = torch.arange(32, device=weight.device).view(2, 16) % weight.shape[0]  # (2, 16)
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        plain = _hidden(model, ids)
        with causal(model):
            return bool((_hidden(model, ids) - plain).norm() <= _TOLERANCE * plain.norm())
    except (AttributeError, KeyError, RuntimeError, TypeError):  # it builds its own mask, or reckons with one
        return False
    finally:
        for module, mode in modes:
            module.training = mode


def _hidden(model: "PreTrainedModel", ids: Tensor) -> Tensor:
    out: Tensor = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    return out.float()


def _causal_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """SDPA without a mask, by which every position sees all before it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if attention_mask is not None:
        raise RuntimeError("a model that builds its own attention mask cannot do without it")
    out, _ = sdpa_attention_forward(module, query, key, value, None, **kwargs)
    return out, None
