"""Loads a trained adapter with its image classifier."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moka_pl.adapters import load_adapter, local_adapter
from moka_pl.adapters.reading import read_adapter
from moka_pl.backbone import BackboneConfig, fingerprint
from moka_pl.errors import AdapterError
from moka_pl.vision.backbone import load_image_backbone

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel


def adapter_labels(path: str | Path) -> list[str]:
    """Returns the classes that an adapter directory was trained on.

    Raises:
        AdapterError: If it is none of an image classifier.
    """
    labels = read_adapter(path).labels
    if not labels:
        raise AdapterError(
            f"{path} is no adapter of an image classifier (it has no labels); give one of a VisionModule"
        )
    return labels


def load_classifier(
    path: str | Path,
    device: torch.device | str | None = None,
    base: str | None = None,
    revision: str | None = None,
) -> "tuple[PreTrainedModel, BaseImageProcessor]":
    """Loads an adapter together with its image classifier.

    Args:
        path: An adapter directory, or the hub id of one.
        device: The model's device; None is the GPU if there is one, else the CPU.
        base: Name or path of the base; None is the one stored with the adapter.
        revision: Branch, tag or commit of the adapter on the hub.

    Returns:
        The model with its adapters, in evaluation mode, whose ``config.id2label`` names the classes, and the
        image processor.

    Raises:
        AdapterError: If the directory is damaged, of another base, or of no image classifier.
        BackboneError: If the base cannot be loaded.
    """
    path = local_adapter(path, revision)
    labels, stored = adapter_labels(path), read_adapter(path).base
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options = stored.options | {"compute_dtype": "auto"}
    config = BackboneConfig(stored.name, stored.revision, **options)
    if base is not None:
        config = replace(config, name=base, revision=None)
    loaded = load_image_backbone(config, labels, device)
    assert loaded.processor is not None
    load_adapter(loaded.model, path, fingerprint(loaded.model))
    return loaded.model.eval(), loaded.processor
