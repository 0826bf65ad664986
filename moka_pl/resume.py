"""Finds the run that ``--ckpt_path last`` means."""

from pathlib import Path
from typing import Any, NamedTuple

from moka_pl.errors import ConfigError


class LastRun(NamedTuple):
    """The newest resumable run of a name."""

    checkpoint: Path
    version: int


def find_last(logger: Any) -> LastRun:
    """Returns the newest ``version_<k>`` below the logger's folder that holds a ``checkpoints/last.ckpt``.

    Args:
        logger: The parsed ``trainer.logger`` (class_path and init_args of a TensorBoardLogger).

    Returns:
        The checkpoint and the version whose logs go on.

    Raises:
        ConfigError: If there is none, or the logger keeps no versions.
    """
    options = getattr(logger, "init_args", None)
    if options is None or not hasattr(options, "save_dir") or not hasattr(options, "version"):
        raise ConfigError(
            "--ckpt_path last looks for the newest version_<k> of a TensorBoardLogger, but trainer.logger is "
            f"{logger!r}; give the path of the checkpoint instead"
        )
    folder = Path(options.save_dir) / (options.name or "")
    runs = []
    for checkpoint in folder.glob("version_*/checkpoints/last.ckpt"):
        number = checkpoint.parents[1].name.removeprefix("version_")
        if number.isdigit():
            runs.append(LastRun(checkpoint, int(number)))
    if not runs:
        raise ConfigError(
            f"--ckpt_path last: no run below {folder} has a checkpoints/last.ckpt. Start without "
            "--ckpt_path, or give the path of a checkpoint"
        )
    return max(runs, key=lambda run: run.version)
