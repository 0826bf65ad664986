"""Finds the run that ``--ckpt_path last`` means."""

from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

from moka_pl.errors import ConfigError

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
