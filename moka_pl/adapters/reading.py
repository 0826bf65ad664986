"""Reads adapter directories, which may come from strangers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from moka_pl.adapters.config import AdapterConfig, MokaConfig
from moka_pl.adapters.methods.registry import config_from, method_of
from moka_pl.adapters.pretrained.hub import download, is_hub_id
from moka_pl.adapters.schema import check_value, check_values, shown
from moka_pl.backbone import BackboneConfig, check_samples
from moka_pl.errors import AdapterError, ConfigError, listed, one_line
from moka_pl.ops.finite import non_finite_names
from moka_pl.utils import expanded, recover_folder, unfetched_reason
from moka_pl.version import __version__

FORMAT_VERSION = 5
CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
CARD_NAME = "README.md"

#: Bytes; that of a thousand layers with filters of their own has one million.
_LONGEST_CONFIG = 2**24
#: Features of a layer; the largest vocabularies have a sixteenth of that.
_WIDEST = 2**22
#: What adapters are made of, by its name in the file; some methods of PEFT's save indices, too.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
}


@dataclass
class BaseModel:
    """The base model that an adapter was trained on.

    Args:
        name: Hub id, short name or path, as given by the user.
        revision: Hub revision, if given.
        fingerprint: Hash of the base's shape and some of its weights; tells bases apart whatever their name.
        options: Further backbone options needed to build it again (quantisation, compute dtype, …).
        samples: Samples of its weight matrices, which tell apart what shares the embedding.
    """

    name: str
    revision: str | None = None
    fingerprint: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    samples: str = field(default="", compare=False, repr=False)


@dataclass
class AdapterInfo:
    """The contents of ``adapter_config.json``.

    Args:
        config: A ``MokaConfig`` or that of another method.
        base: The base model.
        extra: Further values.
        exact_lora_rank: Smallest and largest rank of the LoRAs that the layers' updates are exactly; empty
            where the directory does not tell.
        layer_sizes: Output and input features of the adapted layers, by name; empty likewise.
    """

    config: Any
    base: BaseModel
    extra: dict[str, Any] = field(default_factory=dict)
    exact_lora_rank: list[int] = field(default_factory=list, compare=False)
    layer_sizes: dict[str, list[int]] = field(default_factory=dict, compare=False)

    @property
    def labels(self) -> list[str]:
        """The classes in their order, if it is of an image classifier; empty of a language model."""
        labels = self.extra.get("labels")
        return [str(label) for label in labels] if isinstance(labels, list) else []

    def check_base(self, fingerprint: str | None, path: str | Path, samples: str = "") -> None:
        """Refuses a base other than the adapter's own, if both fingerprints are known.

        Args:
            fingerprint: The base's.
            path: The adapter directory.
            samples: The base's samples; without any, and with an older adapter, only fingerprints count.
        """
        if fingerprint and self.base.fingerprint and fingerprint != self.base.fingerprint:
            raise AdapterError(
                f"{path} was trained on another base model: {self.base.name!r} with fingerprint "
                f"{self.base.fingerprint}; this base has {fingerprint}. Load the adapter's base instead"
            )
        if fingerprint and samples:
            check_samples(self.base.samples, samples, str(path), self.base.name)


class _Stored(TypedDict, total=False):
    """Fields of ``adapter_config.json`` beside the method's own."""

    format_version: int
    peft_type: str
    base_model_name_or_path: str
    revision: str | None
    base_fingerprint: str
    base_samples: str
    trainable_parameters: int
    effective_scaling: float
    exact_lora_rank: list[int]
    layer_sizes: dict[str, list[int]]
    extra: dict[str, Any]


class _Extra(TypedDict, total=False):
    """Known fields of ``extra``."""

    metrics: dict[str, float] | None
    step: int | None
    metrics_step: int | None
    prompt: str | None
    data: str | None
    training: dict[str, Any] | None
    labels: list[str] | None


def local_adapter(path: str | Path, revision: str | None = None) -> Path:
    """Returns the folder of an adapter: ``path`` itself, or what the hub has under that id.

    An id is ``owner/name`` where neither such a folder nor a folder ``owner`` is here. Of the hub's files the
    configuration and the tensors are downloaded, nothing else.

    Args:
        path: An adapter directory, or a hub id.
        revision: Branch, tag or commit on the hub; a folder here has none.

    Raises:
        AdapterError: If the path is empty, or the hub has no such adapter or refuses it, or it is neither
            cached nor within reach.
    """
    if not str(path).strip():  # which would be the folder where one is
        raise AdapterError(
            "the path of the adapter (adapter_path) is empty; give an adapter directory, such as "
            "RUN/adapters/best, or leave it out"
        )
    if is_hub_id(name := Path(path).as_posix()):
        return download(name, (CONFIG_NAME, WEIGHTS_NAME), revision)
    if revision is not None:
        raise AdapterError(f"{path} is a path on this machine, without revision {revision!r}; leave that out")
    return expanded(path)


def read_adapter(path: str | Path) -> AdapterInfo:
    """Reads and checks ``adapter_config.json`` of an adapter directory, here or on the hub.

    Raises:
        AdapterError: If the folder or a file is missing, malformed, of a newer format or another method.
    """
    path = local_adapter(path)
    recover_folder(path)
    file, stored = path / CONFIG_NAME, _read_config(path)
    ours = stored.get("peft_type") == "MOKA" or "method" in stored
    if not ours or not isinstance(stored.get("peft_type"), str):
        raise AdapterError(
            f"{file} is not a moka_pl adapter (its peft_type is {shown(stored.get('peft_type'))}). "
            "Give a folder that moka_pl saved"
        )
    version = stored.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise AdapterError(
            f"{file} has no format_version from 1 on, but {shown(version)}; copy the adapter again"
        )
    if version > FORMAT_VERSION:
        raise AdapterError(
            f"{path} has adapter format {shown(version)}, but moka_pl {__version__} reads up to "
            f"{FORMAT_VERSION}. Upgrade moka_pl"
        )
    try:
        check_values(_Stored, stored)
        check_values(_Extra, stored.get("extra", {}), "extra.")
        for name, sizes in stored.get("layer_sizes", {}).items():
            if len(sizes) != 2 or not all(0 < features <= _WIDEST for features in sizes):
                raise ConfigError(f"layer_sizes of {shown(name)} cannot be {shown(sizes)}")
        options = _base_options(stored.get("base_options", {}))
        base = BaseModel(
            name=stored["base_model_name_or_path"],
            revision=stored.get("revision"),
            fingerprint=stored.get("base_fingerprint", ""),
            options=options,
            samples=stored.get("base_samples", ""),
        )
        config = _as_applied(config_from(stored), stored.get("effective_scaling"))
        method_of(config)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error
    except KeyError as error:
        raise AdapterError(f"{file} is damaged: it has no {error.args[0]}. Copy the adapter again") from error
    except (ConfigError, TypeError, ValueError, OverflowError, AttributeError) as error:
        raise AdapterError(f"{file} is damaged: {one_line(error)}. Copy the adapter again") from error
    told = {name: stored[name] for name in ("extra", "exact_lora_rank", "layer_sizes") if name in stored}
    return AdapterInfo(config, base, **told)


def _as_applied(config: AdapterConfig, applied: float | None) -> AdapterConfig:
    """The configuration with the scaling that was applied, where ``null`` has had another meaning since."""
    if not isinstance(config, MokaConfig) or config.scaling is not None or applied is None:
        return config
    return config if applied == config.effective_scaling else replace(config, scaling=float(applied))


def _base_options(options: Any) -> dict[str, Any]:
    """Checks the options of the base; a stranger's may say where to write (``cache_dir``)."""
    known = BackboneConfig(new_tokens=["any"]).options()
    try:
        check_value(options, dict, "base_options")
        check_values(BackboneConfig, options)
        if unknown := sorted(options.keys() - known.keys()):
            raise ConfigError(f"{unknown[0]} is no option of a base; choose one of {', '.join(known)}")
    except ConfigError as error:
        raise AdapterError(
            f"base_options in {CONFIG_NAME} are damaged: {error}. Copy the adapter again"
        ) from error
    return dict(options)


def read_adapter_shapes(path: str | Path) -> dict[str, Tensor]:
    """Reads names, sizes and dtypes of an adapter's tensors: tensors on the meta device, without contents.

    Raises:
        AdapterError: If the file is missing or damaged, or holds numbers of a kind that no adapter has.
    """
    path = local_adapter(path)
    with _open_weights(path) as handle:
        tensors = {}
        for name in handle.keys():  # noqa: SIM118  # it is no mapping
            entry = handle.get_slice(name)
            dtype = _DTYPES.get(entry.get_dtype())
            if dtype is None:
                raise AdapterError(
                    f"{path / WEIGHTS_NAME}: {shown(name)} has {entry.get_dtype()} numbers, as no adapter has"
                )
            tensors[name] = torch.empty(entry.get_shape(), dtype=dtype, device="meta")
    return tensors


def read_counted_shapes(path: str | Path) -> dict[str, Tensor]:
    """Reads what :func:`read_adapter_shapes` does, and counts it: no model tells here what is too many.

    Raises:
        AdapterError: Likewise, or if they are not as many numbers as the configuration beside them says.
    """
    path = local_adapter(path)
    tensors = read_adapter_shapes(path)
    promised, held = _read_config(path).get("trainable_parameters"), sum(t.numel() for t in tensors.values())
    if promised is not None and promised != held:
        raise AdapterError(
            f"{path / WEIGHTS_NAME} holds {held:,} numbers, but {CONFIG_NAME} says {shown(promised)}. "
            "Copy the adapter again"
        )
    return tensors


def read_adapter_state(path: str | Path) -> dict[str, Tensor]:
    """Reads the adapter's tensors.

    Raises:
        AdapterError: If the file is missing, truncated or damaged, or a number is not finite.
    """
    path = local_adapter(path)
    shapes = read_counted_shapes(path)
    with _open_weights(path) as handle:
        state: dict[str, Tensor] = {name: handle.get_tensor(name) for name in shapes}
    if bad := non_finite_names(state):
        count = int((~torch.isfinite(state[bad[0]])).sum())
        raise AdapterError(
            f"{path / WEIGHTS_NAME}: {len(bad)} of {len(state)} tensors hold a NaN or an infinity (first "
            f"{shown(bad[0])}: {count} of its {state[bad[0]].numel():,} numbers). The run that trained it "
            "diverged: use an earlier adapter"
        )
    return state


def _read_config(path: Path) -> dict[str, Any]:
    """Reads ``adapter_config.json``, a mapping of anything."""
    file = path / CONFIG_NAME
    try:
        if not file.is_file():
            raise AdapterError(f"{path} is not an adapter directory: {_instead(path)}")
        if (reason := unfetched_reason(file)) is not None:
            raise AdapterError(f"{path} cannot be read: {reason}")
        if (size := file.stat().st_size) > _LONGEST_CONFIG:
            raise AdapterError(
                f"{file} has {size:,} bytes; that of an adapter has at most {_LONGEST_CONFIG:,}"
            )
        stored = json.loads(file.read_text(encoding="utf-8"))
    except AdapterError:
        raise
    except OSError as error:
        raise AdapterError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{file} is damaged: {one_line(error)}. Copy the adapter again") from error
    if not isinstance(stored, dict):
        raise AdapterError(
            f"{file} is not a moka_pl adapter (it holds a {type(stored).__name__!r}). "
            "Give a folder that moka_pl saved"
        )
    return stored


def _instead(path: Path) -> str:
    """Tells what is at a path that is no adapter directory, and which ones are near."""
    if not path.exists():
        beside = sorted(file.parent.name for file in path.parent.glob(f"*/{CONFIG_NAME}"))
        return "no such folder" + (f"; found {listed(beside, 5)} beside it" if beside else "")
    if not path.is_dir():
        # A file of an adapter, or a checkpoint in the folder beside the adapters.
        near = [path.parent, *_below(path.parent.parent / "adapters")]
        near = [folder for folder in near if (folder / CONFIG_NAME).is_file()]
        return "it is a file" + (f"; give the folder {near[0]}" if near else "")
    if found := _below(path):
        return f"it has no {CONFIG_NAME}; give a folder in it, such as {found[0]}"
    whole = "; it holds a whole model" if (path / "config.json").is_file() else ""
    return f"it has no {CONFIG_NAME}{whole}"


def _below(folder: Path) -> list[Path]:
    """Returns the adapter directories in a run's folder, or in that of the newest run, the best one first."""
    for pattern in ("*", "adapters/*", "*/adapters/*", "*/*/adapters/*"):
        if files := list(folder.glob(f"{pattern}/{CONFIG_NAME}")):
            newest = max(files, key=lambda file: file.stat().st_mtime).parent.parent
            return sorted(file.parent for file in files if file.parent.parent == newest)
    return []


@contextmanager
def _open_weights(path: Path) -> Iterator[Any]:
    """Opens the tensors' file, whose header safetensors checks against its size."""
    from safetensors import SafetensorError, safe_open

    file = path / WEIGHTS_NAME
    try:
        if not file.is_file():
            raise AdapterError(f"{path} is not an adapter directory: it has no {WEIGHTS_NAME}")
        if (reason := unfetched_reason(file)) is not None:
            raise AdapterError(f"{path} cannot be read: {reason}")
        with file.open("rb") as start:
            header = int.from_bytes(start.read(8), "little")
        if header > _LONGEST_CONFIG:
            raise AdapterError(f"{file} is truncated or damaged (its header has {header:,} bytes)")
        with safe_open(file, framework="pt") as handle:
            yield handle
    except AdapterError:
        raise
    except PermissionError as error:
        raise AdapterError(f"cannot read {file}: {error.strerror}") from error
    except (SafetensorError, OSError, ValueError, RuntimeError, OverflowError) as error:
        reason = one_line(error)
        raise AdapterError(f"{file} is truncated or damaged ({reason}). Copy the adapter again") from error
