"""Adapts a transformers model in somebody else's training loop: transformers' ``Trainer``, TRL's, any other.

The model stays what it is, of its own class, with trainable tensors in it. Trainers of transformers take it
as one with adapters: they train it on a quantised base, and their checkpoints are adapter directories.
"""

import json
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn

from moka_pl._compat import mark_as_adapted
from moka_pl.adapters.config import AdapterConfig
from moka_pl.adapters.directory import load_adapter, replaceable, save_adapter
from moka_pl.adapters.methods.registry import inject_adapter, method_in
from moka_pl.adapters.model_card import public_name
from moka_pl.adapters.pretrained.hub import upload
from moka_pl.adapters.reading import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    BaseModel,
    read_adapter,
    read_adapter_state,
)
from moka_pl.backbone import BackboneConfig, fingerprint
from moka_pl.backbone.quantization import quantization_of
from moka_pl.errors import AdapterError
from moka_pl.lm.compiled import uncompiled
from moka_pl.utils import write_failure

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Model = TypeVar("Model", bound="PreTrainedModel")

#: What trainers of transformers call a folder that they can go on from, and the file that they read then.
_CHECKPOINT, _CHECKPOINT_WEIGHTS = re.compile(r"checkpoint-\d+"), "model.safetensors"
#: Options of a base that say how it is stored.
_STORAGE = ("quantization", "double_quantization")


def attach(
    model: Model,
    adapter: AdapterConfig | str | Path,
    base: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Puts adapters into a transformers model, in place, and freezes all else; returns the same model.

    Any loop that trains what requires gradients then trains the adapters. The model's ``save_pretrained``
    writes an adapter directory, which :func:`moka_pl.load_model` loads, and its ``push_to_hub`` uploads one;
    after :func:`moka_pl.adapters.unload` both are transformers' own again, and refuse what it cannot read.

    Args:
        model: A causal language model of transformers, in 4 bits or not.
        adapter: A :class:`moka_pl.MokaConfig` or another configuration for new adapters; or an adapter
            directory or its hub id, to go on with that one.
        base: What the base is called in adapter directories; None is the name or path that the model was
            loaded from.
        dtype: Dtype of the trainable tensors.

    Raises:
        AdapterError: If the model has adapters already, no layer matches, a match cannot be adapted, or the
            directory is damaged or of another base. The model is then unchanged.
        ConfigError: If the configuration does not fit the model.
    """
    given, model = model, uncompiled(model)
    current = base_of(model, base)
    extra = {}
    if isinstance(adapter, AdapterConfig):
        config: Any = adapter
        inject_adapter(model, config, dtype)
    else:
        info = load_adapter(model, adapter, current.fingerprint, dtype)
        config = info.config
        extra = {name: info.extra[name] for name in ("prompt",) if name in info.extra}
        if base is None:
            options = info.base.options | {name: current.options[name] for name in _STORAGE}
            current = replace(info.base, options=options, samples="")
    hand_over_saving(model, config, current, extra)
    return given


def hand_over_saving(
    model: "PreTrainedModel", config: Any, base: BaseModel, extra: Mapping[str, Any] | None = None
) -> None:
    """Makes an adapted model save and upload its adapter instead of all its weights.

    Args:
        model: A model with injected adapters.
        config: The adapters' configuration.
        base: The base model.
        extra: Further values for the adapter directory.
    """
    model = uncompiled(model)
    saving = _Saving(model, config, base, dict(extra or {}))
    names = set(model.load_state_dict({}, strict=False).missing_keys)  # as a trainer will miss them
    mark_as_adapted(model, names - saving.trained().keys())
    model.save_pretrained = saving.save_pretrained
    model.push_to_hub = saving.push_to_hub


def saving_of(model: nn.Module) -> "_Saving | None":
    """Returns what :func:`hand_over_saving` has given a model, if anything: configuration and base."""
    saving = getattr(vars(uncompiled(model)).get("save_pretrained"), "__self__", None)
    return saving if isinstance(saving, _Saving) else None


def push_to_hub(path: str | Path, repo_id: str, private: bool | None = None, **options: Any) -> str:
    """Uploads an adapter directory and returns the address of the commit.

    Only the configuration, tensors and model card are uploaded. The location of a base on this machine is
    not: of a path only the last part is uploaded, and whoever downloads the adapter passes ``base`` to
    :func:`moka_pl.load_model`.

    Args:
        path: The adapter directory.
        repo_id: The id on the hub, ``owner/name``; a repository is made if there is none.
        private: Whether a new repository is private; None is the owner's default.
        options: ``token``, and further ones of ``huggingface_hub.HfApi.upload_folder``, such as ``revision``,
            ``commit_message`` and ``create_pr``.

    Raises:
        AdapterError: If the directory is damaged, before anything is uploaded; if the id is malformed, or the
            hub cannot be reached or refuses the upload.
    """
    path, files = Path(path), (CONFIG_NAME, WEIGHTS_NAME, CARD_NAME)
    read_adapter_state(path)
    base = read_adapter(path).base.name
    if (public := public_name(base)) == base:
        return upload(path, repo_id, files, private, **options)
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)
        stored = json.loads((path / CONFIG_NAME).read_text(encoding="utf-8"))
        stored["base_model_name_or_path"] = public
        (copy / CONFIG_NAME).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
        shutil.copy(path / WEIGHTS_NAME, copy)
        if (path / CARD_NAME).is_file():  # of an earlier version it may name the path
            card = (path / CARD_NAME).read_text(encoding="utf-8").replace(f"base_model: {base}\n", "")
            (copy / CARD_NAME).write_text(card.replace(base, public), encoding="utf-8")
        return upload(copy, repo_id, files, private, **options)


class _Saving:
    """``save_pretrained`` and ``push_to_hub`` of an adapted model."""

    def __init__(self, model: "PreTrainedModel", config: Any, base: BaseModel, extra: dict[str, Any]) -> None:
        self.model, self.config, self.base, self.extra = model, config, base, extra

    def trained(self) -> dict[str, torch.Tensor]:
        """Returns the trainable tensors by their names in the model."""
        return {name: p.detach() for name, p in self.model.named_parameters() if p.requires_grad}

    def save_pretrained(self, save_directory: str | Path, *args: Any, **options: Any) -> Any:
        """Writes an adapter directory; other files in the folder stay.

        Takes the arguments of transformers' method, of which ``is_main_process``, ``push_to_hub`` and
        ``repo_id`` matter. A folder named ``checkpoint-<step>`` also gets what trainers go on from.
        """
        if method_in(self.model) is None:  # unloaded, perhaps merged
            self._hand_back()
            return self.model.save_pretrained(save_directory, *args, **options)
        if not (args[0] if args else options.get("is_main_process", True)):
            return None
        folder = Path(save_directory)
        _save_among_others(folder, self.model, self.config, self.base, self.extra)
        if _CHECKPOINT.fullmatch(folder.name):
            from safetensors.torch import save_file

            trained = {name: t.contiguous() for name, t in self.trained().items()}
            save_file(trained, folder / _CHECKPOINT_WEIGHTS, metadata={"format": "pt"})
        if options.get("push_to_hub"):
            kept = {name: options[name] for name in ("private", "token", "commit_message") if name in options}
            push_to_hub(folder, options.get("repo_id") or folder.name, **kept)
        return None

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Uploads the adapter; takes the options of :func:`push_to_hub`."""
        if method_in(self.model) is None:
            self._hand_back()
            return str(self.model.push_to_hub(repo_id, **options))
        for option in ("max_shard_size", "tags"):  # of transformers' method; the model card has its own tags
            options.pop(option, None)
        with tempfile.TemporaryDirectory() as scratch:
            folder = save_adapter(Path(scratch) / "adapter", self.model, self.config, self.base, self.extra)
            return push_to_hub(folder, repo_id, **options)

    def _hand_back(self) -> None:
        del self.model.save_pretrained, self.model.push_to_hub
        mark_as_adapted(self.model, None)


def _save_among_others(
    folder: Path, model: nn.Module, config: Any, base: BaseModel, extra: Mapping[str, Any]
) -> None:
    """Saves an adapter in a folder that may hold a trainer's other files."""
    if not folder.exists() or replaceable(folder):
        save_adapter(folder, model, config, base, extra)
        return
    try:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as scratch:
            new = save_adapter(Path(scratch) / "adapter", model, config, base, extra)
            for name in (WEIGHTS_NAME, CARD_NAME, CONFIG_NAME):  # the last one makes it an adapter directory
                if name != CARD_NAME or not (folder / name).exists():
                    (new / name).replace(folder / name)
    except OSError as error:
        reason = write_failure(error, folder, 0)
        raise AdapterError(f"cannot save the adapter to {folder}: {reason}. Choose another folder") from error


def base_of(model: "PreTrainedModel", name: str | None) -> BaseModel:
    """Describes the model that adapters are in, so that it can be loaded again."""
    quantization, double = quantization_of(model)
    options = BackboneConfig("any", quantization=quantization, double_quantization=double).options()
    return BaseModel(name or model.name_or_path, None, fingerprint(model), options)
