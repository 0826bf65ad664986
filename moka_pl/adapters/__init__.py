"""MoKA adapters: their configuration, layer, injection into a model, and form on disk."""

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.directory import (
    AdapterInfo,
    BaseModel,
    adapter_state,
    load_adapter,
    load_adapter_state,
    read_adapter,
    save_adapter,
)
from moka_pl.adapters.injection import (
    adapters_disabled,
    find_targets,
    inject_adapter,
    merge,
    moka_layers,
    unload,
    unmerge,
)
from moka_pl.adapters.layer import MokaLinear

__all__ = [
    "AdapterInfo",
    "BaseModel",
    "MokaConfig",
    "MokaLinear",
    "adapter_state",
    "adapters_disabled",
    "find_targets",
    "inject_adapter",
    "load_adapter",
    "load_adapter_state",
    "merge",
    "moka_layers",
    "read_adapter",
    "save_adapter",
    "unload",
    "unmerge",
]
