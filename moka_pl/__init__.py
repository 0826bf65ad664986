"""Gated mixtures of Kronecker adapters (MoKA) for 4-bit LLaMA models, on PyTorch Lightning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moka_pl.version import __version__

if TYPE_CHECKING:
    from moka_pl.adapters import (
        MokaAdapters,
        MokaConfig,
        attach,
        inject_adapter,
        load_adapter,
        push_to_hub,
        save_adapter,
    )
    from moka_pl.backbone import BackboneConfig, load_backbone
    from moka_pl.data import CommonsenseData, InstructionData, MixtureData, MmluData, TextData
    from moka_pl.inference import load_model
    from moka_pl.training.module import MokaModule
    from moka_pl.training.schedule import WarmupDecay
    from moka_pl.vision import DigitsData, ImageFolderData, VisionModule

__all__ = [
    "BackboneConfig",
    "CommonsenseData",
    "DigitsData",
    "ImageFolderData",
    "InstructionData",
    "MixtureData",
    "MmluData",
    "MokaAdapters",
    "MokaConfig",
    "MokaModule",
    "TextData",
    "VisionModule",
    "WarmupDecay",
    "__version__",
    "attach",
    "inject_adapter",
    "load_adapter",
    "load_backbone",
    "load_model",
    "push_to_hub",
    "save_adapter",
]

_HOMES = {
    "adapters": (
        "MokaAdapters",
        "MokaConfig",
        "attach",
        "inject_adapter",
        "load_adapter",
        "push_to_hub",
        "save_adapter",
    ),
    "backbone": ("BackboneConfig", "load_backbone"),
    "data": ("CommonsenseData", "InstructionData", "MixtureData", "MmluData", "TextData"),
    "inference": ("load_model",),
    "training.module": ("MokaModule",),
    "training.schedule": ("WarmupDecay",),
    "vision": ("DigitsData", "ImageFolderData", "VisionModule"),
}


def __getattr__(name: str) -> Any:
    """Imports public names when they are first used: importing the package itself costs nothing."""
    for home, names in _HOMES.items():
        if name in names:
            return getattr(import_module(f"moka_pl.{home}"), name)
    raise AttributeError(f"module 'moka_pl' has no attribute {name!r}")


def __dir__() -> list[str]:
    """Lists the public names before their first use, too."""
    return sorted({*globals(), *__all__})
