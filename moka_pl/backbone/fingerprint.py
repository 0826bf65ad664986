"""A short hash that tells base models apart, whatever they are called or how they are stored."""

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_ROWS = 256


def fingerprint(model: "PreTrainedModel") -> str:
    """Hashes the model's sizes and the signs of some rows of its embedding (16 hexadecimal digits).

    The embedding is never quantised, and rounding to another dtype keeps every sign (of zero, too): loading
    the same weights in another dtype or quantisation gives the same fingerprint, other weights give another.
    """
    digest = hashlib.sha256()
    digest.update(repr([getattr(model.config, key, None) for key in _SIZES]).encode())
    embedding = model.get_input_embeddings().weight.detach()  # (vocabulary, hidden)
    rows = torch.arange(_ROWS, device=embedding.device) * (embedding.shape[0] - 1) // (_ROWS - 1)
    digest.update(embedding[rows].signbit().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]
