"""A short hash that tells base models apart, whatever they are called or how they are stored."""

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SIZES = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")


def fingerprint(model: "PreTrainedModel") -> str:
    """Hashes the model's sizes, its final norm and a few rows of its embedding (16 hexadecimal digits).

    Embedding and norms are never quantised, and are compared in bfloat16: loading the same weights in
    another dtype or quantisation gives the same fingerprint, other weights give another.

    Args:
        model: The base model, with or without adapters.

    Returns:
        The fingerprint.
    """
    digest = hashlib.sha256()
    digest.update(repr([getattr(model.config, key, None) for key in _SIZES]).encode())
    embedding = model.get_input_embeddings().weight
    rows = torch.linspace(0, embedding.shape[0] - 1, 16).long().to(embedding.device)
    parts = [embedding[rows]]
    norm = getattr(model.get_decoder(), "norm", None)
    if norm is not None:
        parts.append(norm.weight)
    for part in parts:
        low = part.detach().to(torch.bfloat16).contiguous().cpu()
        digest.update(low.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
