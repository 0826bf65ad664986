"""Reads adapter directories, which may come from strangers."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from moka_pl.adapters.methods.registry import config_from, method_of
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.utils import recover_folder
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


def read_adapter(path: str | Path) -> AdapterInfo:
    """Reads and checks ``adapter_config.json`` of an adapter directory.

    Raises:
        AdapterError: If the folder or a file is missing, malformed, of a newer format or another method.
    """
    path = Path(path)
    recover_folder(path)
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
