"""The frozen causal language model and its tokenizer: hub, folder, GGUF file or random weights."""

from moka_pl.backbone.config import BackboneConfig
from moka_pl.backbone.fingerprint import check_samples, fingerprint, weight_samples
from moka_pl.backbone.load import Backbone, Unloaded, compute_dtype, load_backbone, load_tokenizer

__all__ = [
    "Backbone",
    "BackboneConfig",
    "Unloaded",
    "check_samples",
    "compute_dtype",
    "fingerprint",
    "load_backbone",
    "load_tokenizer",
    "weight_samples",
]
