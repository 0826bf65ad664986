"""The adapter directory, the product of a run: a few megabytes.

Files:
    adapter_config.json         method, options, base model, format version, parameter count
    adapter_model.safetensors   factors and gate logits, named as in the model
    README.md                   model card
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import SERVABLE
from moka_pl.adapters.injection import moka_layers
from moka_pl.adapters.methods.base import check_tensors
from moka_pl.adapters.methods.registry import inject_adapter, method_in, method_of, unload
from moka_pl.adapters.model_card import model_card
from moka_pl.adapters.reading import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    AdapterInfo,
    BaseModel,
    local_adapter,
    read_adapter,
    read_adapter_shapes,
    read_adapter_state,
)
from moka_pl.adapters.vocabulary.embedding import MokaEmbedding
from moka_pl.backbone import weight_samples
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.lm.compiled import uncompiled
from moka_pl.ops.finite import non_finite_names
from moka_pl.utils import expanded, replaced_folder, sync_file, write_failure
from moka_pl.version import __version__


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's trained tensors by name."""
    method = method_in(model)
    return {} if method is None else method.state(uncompiled(model))


def save_adapter(
    path: str | Path,
    model: nn.Module,
    config: Any,
    base: BaseModel,
    extra: Mapping[str, Any] | None = None,
) -> Path:
    """Writes an adapter directory and returns ``path``; replaces an older one once the new one is complete.

    Other files in the older directory, such as notes or results, are kept.

    Args:
        path: The directory to write.
        model: A model with injected adapters.
        config: The adapters' configuration, of any method.
        base: The base model.
        extra: Further JSON values to keep (metrics, prompt, step).

    Raises:
        AdapterError: If the adapter is not finite, the disk is full or read-only, or ``path`` is something
            other than an adapter directory or an empty folder. ``path`` is then unchanged.
    """
    from safetensors.torch import save

    path, model = expanded(path), uncompiled(model)
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    if not state:
        raise AdapterError("the model has no adapters to save")
    _check_finite(state, path)
    base = replace(base, samples=base.samples or _samples_below(model))
    stored = _contents(config, base, sum(tensor.numel() for tensor in state.values()), model, extra or {})
    # Not save_file: it hides OSErrors and makes a file that only its owner may read.
    weights = save(state, metadata={"format": "pt"})
    texts = {
        CONFIG_NAME: json.dumps(stored, indent=2) + "\n",
        CARD_NAME: model_card(stored, method_of(config), model),
    }
    try:
        if path.exists() and not replaceable(path):
            raise AdapterError(
                f"cannot save the adapter to {path}: it is not an adapter directory and would be "
                "overwritten. Choose a new or empty folder"
            )
        with replaced_folder(path) as new:
            new.mkdir()
            (new / WEIGHTS_NAME).write_bytes(weights)
            for name, text in texts.items():
                (new / name).write_text(text, encoding="utf-8")
            for file in new.iterdir():
                sync_file(file)
            if path.exists():
                _carry_over(path, new)
    except OSError as error:
        reason = write_failure(error, path.parent, len(weights) + sum(map(len, texts.values())))
        raise AdapterError(
            f"cannot save the adapter to {path}: {reason}. "
            "An older adapter there is unchanged. Free some space or choose another folder"
        ) from error
    return path


def _samples_below(model: nn.Module) -> str:
    """Samples the frozen matrices below a model's adapters; where those were trained, there are none."""
    method = method_in(model)
    if method is None or not method.keeps_base:
        return ""
    return weight_samples(model, {name for name, p in model.named_parameters() if p.requires_grad})


def _check_finite(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuses to save a NaN or an infinity."""
    if bad := non_finite_names(state):
        raise AdapterError(
            f"the adapter is not saved in {path}: {len(bad)} of its {len(state)} tensors hold a NaN or an "
            f"infinity (first {bad[0]}). An older adapter there is unchanged. Lower the learning rate"
        )


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies tensors into a model's injected adapters; names and shapes must match exactly.

    Args:
        model: A model with adapters of the same configuration.
        state: Tensors by name, as :func:`adapter_state` gives them.
        source: Their origin, for messages.

    Raises:
        AdapterError: On missing or unexpected tensors or other shapes; the model is then unchanged.
    """
    model = uncompiled(model)
    check_tensors(state, adapter_state(model), source)
    method = method_in(model)
    if method is None:
        return
    method.copy_state(model, dict(state))
    for layer in method.layers(model).values():
        if layer.merged_layer is not None:  # what was folded in is out of date
            layer.unmerge()
            layer.merge()


def load_adapter(
    model: nn.Module, path: str | Path, fingerprint: str | None = None, dtype: torch.dtype = torch.float32
) -> AdapterInfo:
    """Injects a saved adapter into its base model, in place.

    Args:
        model: The frozen base, without adapters.
        path: An adapter directory, or the hub id of one.
        fingerprint: The base's fingerprint; None skips the check of the base.
        dtype: Dtype of the adapter's tensors.

    Raises:
        AdapterError: If the directory is damaged, of a newer format or of another base model. No adapters
            are then left in the model.
    """
    path, model = local_adapter(path), uncompiled(model)
    info = read_adapter(path)
    info.check_base(fingerprint, path, weight_samples(model) if fingerprint else "")
    shapes = read_adapter_shapes(path)
    try:
        inject_adapter(model, info.config, dtype, saved=shapes)
    except (AdapterError, ConfigError) as error:
        raise AdapterError(f"{path}: {error}") from error
    try:
        load_adapter_state(model, read_adapter_state(path), path)
    except AdapterError:
        if method_of(info.config).keeps_base:
            unload(model)
        raise
    return info


def _contents(
    config: Any, base: BaseModel, size: int, model: nn.Module, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what ``adapter_config.json`` holds.

    Args:
        config: The adapters' configuration.
        base: The base model.
        size: Number of trained parameters.
        model: The adapted model, for the sizes and exact LoRA ranks of its layers.
        extra: Further values.
    """
    method = method_of(config)
    ranks = method.lora_ranks(model)
    sizes = {name: [layer.out_features, layer.in_features] for name, layer in moka_layers(model).items()}
    # For people only; of other methods than MoKA, what marks a folder as written here.
    notes = (
        {"effective_scaling": config.effective_scaling}
        if isinstance(config, MokaConfig)
        else {"method": method.title}
    )
    return {
        **method.options(),
        "format_version": _format_of(config, model),
        "peft_type": method.kind,
        "moka_pl_version": __version__,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "base_fingerprint": base.fingerprint,
        "base_options": base.options,
        "base_samples": base.samples,
        "trainable_parameters": size,
        **notes,
        **({"exact_lora_rank": [min(ranks), max(ranks)]} if ranks else {}),
        **({"layer_sizes": sizes} if sizes else {}),
        "extra": dict(extra),
    }


def _format_of(config: Any, model: nn.Module) -> int:
    """Returns the oldest format that can say this."""
    if not isinstance(config, MokaConfig):
        return 1
    embeds = any(isinstance(layer, MokaEmbedding) for layer in moka_layers(model).values())
    if embeds or config.trainable_token_indices or config.modules_to_save:
        return 5
    if config.filters == SERVABLE or config.start == "zero_left":
        return 4
    if config.gating == "sigmoid":
        return 3
    filters = config.filters
    identities = isinstance(filters, list) and any(len(sizes) == 3 for sizes in filters)
    return 2 if identities or isinstance(filters, dict) else 1


def replaceable(path: Path) -> bool:
    """Whether saving may take this place: an older adapter or an empty folder, never a user's other files."""
    return path.is_dir() and ((path / CONFIG_NAME).exists() or not any(path.iterdir()))


def _carry_over(path: Path, new: Path) -> None:
    """Gives the new folder all that is not the adapter's own; the older one keeps it, too."""
    for item in path.iterdir():
        if item.name in (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME):
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.copytree(item, new / item.name, symlinks=True, copy_function=_link)
        else:
            _link(item, new / item.name)


def _link(source: str | Path, target: str | Path) -> None:
    """Gives a file a second name, which takes no space; copies it where the file system has no such names."""
    try:
        os.link(source, target, follow_symlinks=False)
    except (OSError, NotImplementedError):
        shutil.copy2(source, target, follow_symlinks=False)
        if not Path(target).is_symlink():
            sync_file(Path(target))
