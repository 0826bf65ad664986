"""What a resumable checkpoint holds: trainable tensors and random generators, never a frozen tensor."""

import random
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from moka_pl.adapters.filters import describe_filters
from moka_pl.errors import AdapterError, ConfigError

_REMEDY = "Resume with the configuration of the run that wrote it"


def trainable_state(module: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Keeps those entries of a state dict that belong to parameters that require a gradient."""
    trainable = {name for name, p in module.named_parameters() if p.requires_grad}
    return {name: tensor for name, tensor in state.items() if name in trainable}


def frozen_names(model: nn.Module) -> list[str]:
    """Names of all buffers, and of the parameters that require no gradient."""
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    return frozen + [name for name, _ in model.named_buffers()]


def check_trainable_state(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Refuses a state dict that is not exactly the module's trainable tensors.

    Raises:
        AdapterError: On a missing or unexpected tensor or another shape.
    """
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise AdapterError(
            f"the checkpoint does not fit this model: {len(missing)} trainable tensors are missing "
            f"{missing[:1]}, {len(unexpected)} are unexpected {unexpected[:1]}. {_REMEDY}"
        )
    for name, parameter in own.items():
        if parameter.shape != state[name].shape:
            raise AdapterError(
                f"the checkpoint does not fit this model: {name} is {tuple(state[name].shape)}, "
                f"expected {tuple(parameter.shape)}. {_REMEDY}"
            )


def check_same_factors(written: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Refuses a checkpoint whose adapters have other factors than this model's.

    Args:
        written: The checkpoint's adapter configuration.
        own: This model's.

    Raises:
        AdapterError: If an option differs that shapes the factors.
    """
    kinds = [options.get("peft_type", "MOKA") for options in (written or own, own)]
    if kinds[0] != kinds[1]:
        raise AdapterError(
            f"the checkpoint does not fit this model: its method is {kinds[0]}, here it is {kinds[1]}. "
            f"{_REMEDY}"
        )
    # Of another method's options any may change what the same tensors mean.
    options = ("filters", "components", "gating") if kinds[1] == "MOKA" else sorted(own)
    for option in options:
        if "dropout" not in option and option in written and written[option] != own[option]:
            its, mine = (_short(options[option]) for options in (written, own))
            raise AdapterError(
                f"the checkpoint does not fit this model: its adapter.{option} is {its}, here it is {mine}. "
                f"{_REMEDY}"
            )


def check_same_ratios(written: Mapping[str, float], own: Mapping[str, float]) -> None:
    """Refuses to go on with other learning-rate ratios: the stored optimizer brings its own.

    Args:
        written: The ratios of the run that wrote the checkpoint, by part.
        own: This run's.

    Raises:
        AdapterError: If one differs.
    """
    for part, ratio in own.items():
        if written[part] != ratio:
            raise AdapterError(
                f"the checkpoint was trained with learning_rate_ratios.{part} {written[part]:g}, here it is "
                f"{ratio:g}. {_REMEDY}"
            )


def _short(value: Any) -> str:
    """A value to print; filters of hundreds of layers are described."""
    return describe_filters(value) if isinstance(value, dict) else repr(value)


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of the random generators of torch, the device and Python, in plain types."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": list(random.getstate()[1]),
    }


def set_rng_state(state: Mapping[str, Any], device: torch.device, rank: int) -> None:
    """Puts the generators back to a stored state.

    Only the first rank's generators are stored; the other ranks go on from seeds derived from it.
    """
    if rank > 0:
        torch.manual_seed(int(state["torch"].long().sum()) + rank)
        return
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    version, _, gauss = random.getstate()
    random.setstate((version, tuple(state["python"]), gauss))


# Finds the run that ``--ckpt_path last`` means.


LAST_NAME = "last.ckpt"

#: Where the checkpoint callback's state keeps the version of the run's logs.
VERSION_KEY = "moka_log_version"


class LastRun(NamedTuple):
    """The newest resumable run of a name; its version is None where no logs can go on."""

    checkpoint: Path
    version: int | str | None


def find_last(logger: Any, dirpath: str | None = None) -> LastRun:
    """Returns the run whose ``last.ckpt`` is the newest.

    Args:
        logger: The parsed ``trainer.logger`` (class_path and init_args of a TensorBoardLogger).
        dirpath: The folder that the user keeps checkpoints in (``checkpoint.dirpath``); None looks for the
            newest ``version_<k>`` below the logger's folder that holds a ``checkpoints/last.ckpt``.

    Returns:
        The checkpoint and the version whose logs go on.

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
        return LastRun(checkpoint, _version(checkpoint) if versions else None)
    if not versions:
        raise ConfigError(
            "--ckpt_path last looks for the newest version_<k> of a TensorBoardLogger, but trainer.logger is "
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
    return LastRun(checkpoint, version)


def _version(checkpoint: Path) -> int | str | None:
    """The version of the logs that a checkpoint remembers."""
    import torch

    try:
        stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        reason = str(error).split("\n", 1)[0].strip()
        raise ConfigError(f"--ckpt_path {checkpoint} is damaged or no checkpoint ({reason})") from error
    for state in stored.get("callbacks", {}).values():
        if isinstance(state, dict) and state.get(VERSION_KEY) is not None:
            version: int | str = state[VERSION_KEY]
            return version
    return None
