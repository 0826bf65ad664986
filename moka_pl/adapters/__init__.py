"""MoKA adapters and other methods: configuration, layers, injection into a model, and form on disk."""

from moka_pl.adapters.config import AdapterConfig, KronA, MokaConfig, MokaS, MokaServable, MokaUngated
from moka_pl.adapters.directory import adapter_state, load_adapter, load_adapter_state, save_adapter
from moka_pl.adapters.injection import find_targets, moka_layers
from moka_pl.adapters.layer import MokaLayer, MokaLinear
from moka_pl.adapters.methods.base import AdapterMethod
from moka_pl.adapters.methods.full import FullFineTuning
from moka_pl.adapters.methods.registry import (
    adapted_layers,
    adapters_disabled,
    inject_adapter,
    merge,
    method_of,
    unload,
    unmerge,
)
from moka_pl.adapters.named.adapters import MokaAdapters
from moka_pl.adapters.pretrained.attach import attach, hand_over_saving, push_to_hub
from moka_pl.adapters.reading import AdapterInfo, BaseModel, local_adapter, read_adapter
from moka_pl.adapters.vocabulary.embedding import MokaEmbedding

__all__ = [
    "AdapterConfig",
    "AdapterInfo",
    "AdapterMethod",
    "BaseModel",
    "FullFineTuning",
    "KronA",
    "MokaAdapters",
    "MokaConfig",
    "MokaEmbedding",
    "MokaLayer",
    "MokaLinear",
    "MokaS",
    "MokaServable",
    "MokaUngated",
    "adapted_layers",
    "adapter_state",
    "adapters_disabled",
    "attach",
    "find_targets",
    "hand_over_saving",
    "inject_adapter",
    "load_adapter",
    "load_adapter_state",
    "local_adapter",
    "merge",
    "method_of",
    "moka_layers",
    "push_to_hub",
    "read_adapter",
    "save_adapter",
    "unload",
    "unmerge",
]
