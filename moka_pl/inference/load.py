"""Loads a trained adapter with its base model."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from moka_pl.adapters import hand_over_saving, load_adapter, local_adapter, read_adapter
from moka_pl.adapters.reading import CONFIG_NAME
from moka_pl.backbone import Backbone, BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.quantization import QuantisedError
from moka_pl.errors import AdapterError, ConfigError, MokaWarning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    path: str | Path,
    device: torch.device | str | None = None,
    base: str | None = None,
    revision: str | None = None,
) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Loads an adapter together with its base model.

    The model is one of transformers, for ``generate``, pipelines and everything else. Its ``save_pretrained``
    and ``push_to_hub`` write the adapter directory again.

    Args:
        path: An adapter directory, such as ``lightning_logs/smollm2/version_0/adapters/best``, or the hub id
            of one.
        device: The model's device; None is the GPU if there is one, else the CPU.
        base: Name or path of the base model; None is the one stored with the adapter. A stored revision is
            ignored if ``base`` is given.
        revision: Branch, tag or commit of the adapter on the hub.

    Returns:
        The model with its adapters, in evaluation mode, and the tokenizer.

    Raises:
        AdapterError: If the directory is damaged, of a newer format, or of another base model.
        BackboneError: If the base model cannot be loaded.
    """
    path = local_adapter(path, revision)
    info = read_adapter(path)
    if not (base or info.base.name):
        raise AdapterError(f"{path} does not name its base model; give base, its name or folder")
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # The adapter may have been trained on a device with another best dtype.
        options = info.base.options | {"compute_dtype": "auto"}
        config = BackboneConfig(base or info.base.name, None if base else info.base.revision, **options)
    except (ConfigError, TypeError) as error:
        raise AdapterError(
            f"{path}: base_options in {CONFIG_NAME} are damaged: {error}. Copy the adapter again"
        ) from error
    loaded = load_base(config, device)
    for note in loaded.notes:
        warnings.warn(note, MokaWarning, stacklevel=2)
    load_adapter(loaded.model, path, fingerprint(loaded.model))
    saved = info.base if base is None else replace(info.base, name=base, revision=None)
    hand_over_saving(loaded.model, info.config, saved, info.extra)
    loaded.model.config.use_cache = True
    return loaded.model.eval(), loaded.tokenizer


def load_base(config: BackboneConfig, device: torch.device | str) -> Backbone:
    """Loads a base as ``config`` says, or if it is quantised already, as it is."""
    try:
        return load_backbone(config, device)
    except QuantisedError as error:
        return load_backbone(replace(config, quantization=error.stored), device)
