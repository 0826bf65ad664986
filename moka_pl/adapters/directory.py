"""The adapter directory, the product of a run: a few megabytes.

Files:
    adapter_config.json         method, options, base model, format version, parameter count
    adapter_model.safetensors   factors and gate logits, named as in the model
    README.md                   model card
"""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.methods.registry import config_from, inject_adapter, method_in, method_of, unload
from moka_pl.adapters.model_card import model_card
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.version import __version__

FORMAT_VERSION = 3
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"


@dataclass
class BaseModel:
    """The base model that an adapter was trained on.

    Args:
        name: Hub id, short name or path, as given by the user.
        revision: Hub revision, if given.
        fingerprint: Hash of the base's shape and some of its weights; tells bases apart whatever their name.
        options: Further backbone options needed to build it again (quantisation, compute dtype, …).
    """

    name: str
    revision: str | None = None
    fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class AdapterInfo:
    """The contents of ``adapter_config.json``; ``config`` is a ``MokaConfig`` or that of another method."""

    config: Any
    base: BaseModel
    extra: dict[str, Any] = field(default_factory=dict)

    def check_base(self, fingerprint: str | None, path: str | Path) -> None:
        """Refuses a base other than the adapter's own (that of ``path``), if both fingerprints are known."""
        if fingerprint and self.base.fingerprint and fingerprint != self.base.fingerprint:
            raise AdapterError(
                f"{path} was trained on another base model: {self.base.name!r} with fingerprint "
                f"{self.base.fingerprint}; this base has {fingerprint}. Load the adapter's base instead"
            )


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """Returns the adapter's trained tensors by name."""
    method = method_in(model)
    return {} if method is None else method.state(model)


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
        AdapterError: If the disk is full or read-only, or ``path`` is something other than an adapter
            directory or an empty folder. ``path`` is then unchanged.
    """
    from safetensors.torch import save

    path = Path(path)
    state = {name: tensor.cpu().contiguous() for name, tensor in adapter_state(model).items()}
    if not state:
        raise AdapterError("the model has no adapters to save")
    stored = _contents(config, base, sum(tensor.numel() for tensor in state.values()), extra or {})
    try:
        if path.exists() and not _replaceable(path):
            raise AdapterError(
                f"cannot save the adapter to {path}: it is not an adapter directory and would be "
                "overwritten. Choose a new or empty folder"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            # Not save_file: it hides OSErrors and makes a file that only its owner may read.
            (new / WEIGHTS_NAME).write_bytes(save(state, metadata={"format": "pt"}))
            (new / CONFIG_NAME).write_text(json.dumps(stored, indent=2) + "\n", encoding="utf-8")
            (new / CARD_NAME).write_text(model_card(stored, method_of(config)), encoding="utf-8")
            for file in new.iterdir():
                _sync(file)
            if path.exists():
                _carry_over(path, new)
            _swap(new, path, Path(scratch) / "old")
    except OSError as error:
        raise AdapterError(
            f"cannot save the adapter to {path}: {error.strerror or error}. "
            "An older adapter there is unchanged. Free some space or choose another folder"
        ) from error
    return path


def read_adapter(path: str | Path) -> AdapterInfo:
    """Reads and checks ``adapter_config.json`` of an adapter directory.

    Raises:
        AdapterError: If the folder or a file is missing, malformed, of a newer format or another method.
    """
    path = Path(path)
    file = path / CONFIG_NAME
    if not path.is_dir():
        beside = sorted(file.parent.name for file in path.parent.glob(f"*/{CONFIG_NAME}"))
        instead = f"; found {', '.join(beside)} beside it" if beside else ""
        raise AdapterError(f"{path} is not an adapter directory: no such folder{instead}")
    if not file.is_file():
        raise AdapterError(f"{path} is not an adapter directory: it has no {CONFIG_NAME}")
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise AdapterError(f"{file} is damaged: {error}. Copy the adapter again") from error
    ours = isinstance(stored, dict) and (stored.get("peft_type") == "MOKA" or "method" in stored)
    if not ours or not isinstance(stored.get("peft_type"), str):
        kind = stored.get("peft_type") if isinstance(stored, dict) else type(stored).__name__
        raise AdapterError(
            f"{file} is not a moka_pl adapter (its peft_type is {kind!r}). Give a folder that moka_pl saved"
        )
    version = stored.get("format_version")
    if not isinstance(version, int):
        raise AdapterError(f"{file} has no format_version; copy the adapter again")
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path} has adapter format {version}, but moka_pl {__version__} reads up to {FORMAT_VERSION}. "
            "Upgrade moka_pl"
        )
    try:
        config = config_from(stored)
        base = BaseModel(
            name=stored["base_model_name_or_path"],
            revision=stored.get("revision"),
            fingerprint=stored.get("base_fingerprint", ""),
            options=stored.get("base_options", {}),
        )
        method_of(config)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except (ConfigError, KeyError, TypeError, ValueError) as error:
        raise AdapterError(f"{file} is damaged: {error}. Copy the adapter again") from error
    return AdapterInfo(config, base, stored.get("extra", {}))


def read_adapter_state(path: str | Path) -> dict[str, Tensor]:
    """Reads the adapter's tensors.

    Raises:
        AdapterError: If the file is missing or truncated.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = Path(path) / WEIGHTS_NAME
    if not file.is_file():
        raise AdapterError(f"{path} is not an adapter directory: it has no {WEIGHTS_NAME}")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise AdapterError(f"{file} is truncated or damaged ({error}). Copy the adapter again") from error


def load_adapter_state(model: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copies tensors into a model's injected adapters; names and shapes must match exactly.

    Args:
        model: A model with adapters of the same configuration.
        state: Tensors by name, as :func:`adapter_state` gives them.
        source: Their origin, for messages.

    Raises:
        AdapterError: On missing or unexpected tensors or other shapes; the model is then unchanged.
    """
    remedy = "It was saved with other target_modules, components or filters, or for another base model"
    check_tensors(state, adapter_state(model), source, remedy)
    method = method_in(model)
    if method is None:
        return
    method.copy_state(model, dict(state))
    for layer in method.layers(model).values():
        if layer.merged_layer is not None:  # what was folded in is out of date
            layer.unmerge()
            layer.merge()


def check_tensors(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], source: str | Path, remedy: str
) -> None:
    """Refuses tensors that do not have exactly the names and shapes of the expected ones.

    Args:
        state: Tensors by name.
        expected: The model's own tensors by name.
        source: Origin of ``state``, for messages.
        remedy: The last sentence of messages.
    """
    missing, unexpected = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing or unexpected:
        counts = ", ".join(
            f"{kind} tensors: {len(names)}{f' (first {names[0]})' if names else ''}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
        )
        raise AdapterError(f"{source} does not fit this model: {counts}. {remedy}")
    for name, tensor in expected.items():
        if tensor.shape != state[name].shape:
            raise AdapterError(
                f"{source} does not fit this model: {name} is {tuple(state[name].shape)}, "
                f"the model expects {tuple(tensor.shape)}. {remedy}"
            )


def load_adapter(model: nn.Module, path: str | Path, fingerprint: str | None = None) -> AdapterInfo:
    """Injects a saved adapter into its base model, in place.

    Args:
        model: The frozen base, without adapters.
        path: An adapter directory.
        fingerprint: The base's fingerprint; None skips the check of the base.

    Raises:
        AdapterError: If the directory is damaged, of a newer format or of another base model. No adapters
            are then left in the model.
    """
    info = read_adapter(path)
    state = read_adapter_state(path)
    info.check_base(fingerprint, path)
    inject_adapter(model, info.config)
    try:
        load_adapter_state(model, state, path)
    except AdapterError:
        if method_of(info.config).keeps_base:
            unload(model)
        raise
    return info


def _contents(config: Any, base: BaseModel, size: int, extra: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what ``adapter_config.json`` holds."""
    method = method_of(config)
    # For people only; of other methods than MoKA, what marks a folder as written here.
    notes = (
        {"effective_scaling": config.effective_scaling}
        if isinstance(config, MokaConfig)
        else {"method": method.title}
    )
    return {
        **method.options(),
        "format_version": _format_of(config),
        "peft_type": method.kind,
        "moka_pl_version": __version__,
        "base_model_name_or_path": base.name,
        "revision": base.revision,
        "base_fingerprint": base.fingerprint,
        "base_options": base.options,
        "trainable_parameters": size,
        **notes,
        "extra": dict(extra),
    }


def _format_of(config: Any) -> int:
    """Returns the oldest format that can say this."""
    if not isinstance(config, MokaConfig):
        return 1
    if config.gating == "sigmoid":
        return 3
    filters = config.filters
    identities = isinstance(filters, list) and any(len(sizes) == 3 for sizes in filters)
    return 2 if identities or isinstance(filters, dict) else 1


def _replaceable(path: Path) -> bool:
    """Whether saving may take this place: an older adapter or an empty folder, never a user's other files."""
    return path.is_dir() and ((path / CONFIG_NAME).exists() or not any(path.iterdir()))


def _sync(file: Path) -> None:
    """Waits until a file's contents are on disk: a full disk must show before the old adapter goes."""
    with file.open("rb") as handle:
        os.fsync(handle.fileno())


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
            _sync(Path(target))


def _swap(new: Path, path: Path, old: Path) -> None:
    """Puts ``new`` in the place of ``path``, keeping the older one until that has worked."""
    if not path.exists():
        new.rename(path)
        return
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:  # an interrupt, too, must not leave the older one to be deleted
        old.rename(path)
        raise
    shutil.rmtree(old, ignore_errors=True)
