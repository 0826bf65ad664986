"""What a resumable checkpoint holds, and which one ``--ckpt_path last`` means.

A checkpoint is Lightning's own with two changes: its state dict holds the trainable tensors only, and the
fields of :class:`StoredRun` are added.
"""

import random
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Self

import torch

from moka_pl.adapters import method_of
from moka_pl.adapters.filters import describe_filters
from moka_pl.adapters.methods.base import check_tensors
from moka_pl.errors import AdapterError, ConfigError, one_line
from moka_pl.training.learning_rates import LearningRateRatios

if TYPE_CHECKING:
    from moka_pl.training.module import MokaModule

LAST_NAME = "last.ckpt"

#: Where the checkpoint callback's state keeps the version of the run's logs.
VERSION_KEY = "moka_log_version"

#: Stands before the name of each field of :class:`StoredRun`.
_PREFIX = "moka_"

_REMEDY = "Resume with the configuration of the original run"


@dataclass
class StoredRun:
    """What a checkpoint holds beside Lightning's own; an older one may lack fields, which then have defaults.

    Attributes:
        base: The frozen base's ``name`` and ``fingerprint``.
        adapter: Options of the adapter.
        learning_rate_ratios: Ratios by part, as :class:`LearningRateRatios` has them.
        rng: The states of the random generators.
    """

    base: dict[str, str] = field(default_factory=dict)
    adapter: dict[str, Any] = field(default_factory=dict)
    learning_rate_ratios: dict[str, float] = field(default_factory=lambda: asdict(LearningRateRatios()))
    rng: dict[str, Any] | None = None

    @classmethod
    def of(cls, module: "MokaModule") -> Self:
        """Describes the run of a module that has built its model."""
        assert module.base is not None
        return cls(
            base={"name": module.base.name, "fingerprint": module.base.fingerprint},
            adapter=method_of(module.adapter).options(),
            learning_rate_ratios=asdict(module.learning_rate_ratios),
            rng=rng_state(module.device),
        )

    @classmethod
    def read(cls, checkpoint: Mapping[str, Any]) -> Self:
        """Reads the fields of a checkpoint."""
        names = [f.name for f in fields(cls) if f"{_PREFIX}{f.name}" in checkpoint]
        return cls(**{name: checkpoint[f"{_PREFIX}{name}"] for name in names})


def complete_checkpoint(checkpoint: dict[str, Any], module: "MokaModule") -> None:
    """Drops the frozen tensors of Lightning's checkpoint and adds the run, in place."""
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    tensors = checkpoint["state_dict"]
    checkpoint["state_dict"] = {name: tensor for name, tensor in tensors.items() if name in trainable}
    checkpoint |= {f"{_PREFIX}{name}": value for name, value in vars(StoredRun.of(module)).items()}


def check_checkpoint(checkpoint: Mapping[str, Any], module: "MokaModule", training: bool) -> None:
    """Refuses a checkpoint that is not of the module's run.

    Args:
        checkpoint: What :func:`complete_checkpoint` made.
        module: The module, with its model.
        training: Whether training resumes from it.
    """
    stored, current = StoredRun.read(checkpoint), StoredRun.of(module)
    # Before the sizes: factors of other shapes may fill vectors of the same length.
    check_same_factors(stored.adapter, current.adapter)
    trainable = {name: p for name, p in module.named_parameters() if p.requires_grad}
    check_tensors(checkpoint["state_dict"], trainable, "the checkpoint", _REMEDY)
    for part, ratio in current.learning_rate_ratios.items() if training else ():
        if stored.learning_rate_ratios[part] != ratio:  # the stored optimizer brings its own
            raise AdapterError(
                f"the checkpoint was trained with learning_rate_ratios.{part} "
                f"{stored.learning_rate_ratios[part]:g}, but this run has {ratio:g}. {_REMEDY}"
            )
    if stored.base.get("fingerprint", current.base["fingerprint"]) != current.base["fingerprint"]:
        raise AdapterError(
            f"the checkpoint was trained on another base model ({stored.base['name']!r}); this run has "
            f"{current.base['name']!r} with another fingerprint. Load the checkpoint's base instead"
        )


def check_same_factors(stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose adapters have other factors than this model's, by the options of both."""
    methods = [options.get("peft_type", "MOKA") for options in (stored or current, current)]
    if methods[0] != methods[1]:
        raise AdapterError(
            f"the checkpoint does not fit this model: its method is {methods[0]}, this model's is "
            f"{methods[1]}. {_REMEDY}"
        )
    # Of another method's options any may change what the same tensors mean.
    names = ("filters", "components", "gating") if methods[1] == "MOKA" else sorted(current)
    for name in names:
        if "dropout" not in name and name in stored and stored[name] != current[name]:
            raise AdapterError(
                f"the checkpoint does not fit this model: its adapter.{name} is {_short(stored[name])}, "
                f"this model's is {_short(current[name])}. {_REMEDY}"
            )


def _short(value: Any) -> str:
    """Returns a value as text; filters of hundreds of layers are described."""
    return describe_filters(value) if isinstance(value, dict) else repr(value)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Returns the states of the random generators of torch, the device and Python, in plain types."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": list(random.getstate()[1]),
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device, rank: int) -> None:
    """Restores the generators to a stored state.

    Args:
        state: What :func:`rng_state` returned on the first rank.
        device: The device of this rank.
        rank: Number of this rank; all but the first use seeds derived from the state.
    """
    if rank > 0:
        torch.manual_seed(int(state["torch"].long().sum()) + rank)
        return
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    version, _, gauss = random.getstate()
    random.setstate((version, tuple(state["python"]), gauss))


def find_last(logger: Any, dirpath: str | None = None) -> tuple[Path, int | str | None]:
    """Returns the newest run's ``last.ckpt``, and the version whose logs go on; None where no logs can.

    Args:
        logger: The parsed ``trainer.logger`` (class_path and init_args of a TensorBoardLogger).
        dirpath: The folder that the user keeps checkpoints in (``checkpoint.dirpath``); None looks for the
            newest ``version_<k>`` below the logger's folder that holds a ``checkpoints/last.ckpt``.

    Raises:
        ConfigError: If there is none, or it is damaged, or the logger keeps no versions.
    """
    options: Any = getattr(logger, "init_args", None)
    versions = options is not None and hasattr(options, "save_dir") and hasattr(options, "version")
    if dirpath is not None:
        checkpoint = Path(dirpath).expanduser() / LAST_NAME
        if not checkpoint.is_file():
            raise ConfigError(
                f"--ckpt_path last: {dirpath} (checkpoint.dirpath) has no {LAST_NAME}. Start without "
                "--ckpt_path, or give the path of a checkpoint"
            )
        return checkpoint, _version(checkpoint) if versions else None
    if not versions:
        raise ConfigError(
            "--ckpt_path last needs the version_<k> folders of a TensorBoardLogger, but trainer.logger is "
            f"{logger!r}; give the path of the checkpoint instead"
        )
    folder = Path(options.save_dir) / (options.name or "")
    runs = []
    for checkpoint in folder.glob(f"version_*/checkpoints/{LAST_NAME}"):
        number = checkpoint.parents[1].name.removeprefix("version_")
        if number.isdigit():
            runs.append((int(number), checkpoint))
    if not runs:
        raise ConfigError(
            f"--ckpt_path last: no run below {folder} has a checkpoints/{LAST_NAME}. Start without "
            "--ckpt_path, or give the path of a checkpoint"
        )
    version, checkpoint = max(runs)
    return checkpoint, version


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint, without unpickling anything but tensors and plain values.

    Raises:
        ConfigError: If the file is damaged or not a checkpoint.
    """
    try:
        stored: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ConfigError(f"--ckpt_path {path} is damaged or not a checkpoint ({one_line(error)})") from error
    return stored


def _version(checkpoint: Path) -> int | str | None:
    """Returns the version of the logs stored in a checkpoint."""
    for state in read_checkpoint(checkpoint).get("callbacks", {}).values():
        if isinstance(state, dict) and state.get(VERSION_KEY) is not None:
            version: int | str = state[VERSION_KEY]
            return version
    return None
