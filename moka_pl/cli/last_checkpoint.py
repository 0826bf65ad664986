"""Which checkpoint ``--ckpt_path last`` means."""

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from moka_pl.errors import ConfigError
from moka_pl.training.accidents import requeue
from moka_pl.training.checkpoint import LAST_NAME, VERSION_KEY
from moka_pl.training.writing.checkpoint_files import peek, step_of, unusable_reason
from moka_pl.utils import expanded


def find_last(logger: Any, dirpath: str | None = None) -> tuple[Path, int | str | None]:
    """Returns the newest run's last checkpoint, and the version whose logs go on; None where no logs can.

    That is ``last.ckpt``. If it is damaged or not finite, it is the run's other checkpoint of the latest
    step, or else one of an earlier run; a line says so. If none is usable, reading the result says why.

    Args:
        logger: The parsed ``trainer.logger`` (class_path and init_args of a TensorBoardLogger).
        dirpath: The folder that the user keeps checkpoints in (``checkpoint.dirpath``); None looks for the
            newest ``version_<k>`` below the logger's folder that holds ``checkpoints``.

    Raises:
        ConfigError: If there is none, or it is damaged, or the logger keeps no versions.
    """
    found = _find(logger, dirpath, lambda folder: True)
    if found is not None:
        return found
    if dirpath is not None:
        raise ConfigError(
            f"--ckpt_path last: {dirpath} (checkpoint.dirpath) has no {LAST_NAME}. Start without "
            "--ckpt_path, or give the path of a checkpoint"
        )
    if not _has_versions(logger):
        raise ConfigError(
            "--ckpt_path last needs the version_<k> folders of a TensorBoardLogger or CSVLogger, but "
            f"trainer.logger (the first) is {getattr(logger, 'class_path', logger)}; give the path of the "
            "checkpoint instead"
        )
    raise ConfigError(
        f"--ckpt_path last: no run below {_folder_of_runs(logger)} has a checkpoints/{LAST_NAME}. Start "
        "without --ckpt_path, or give the path of a checkpoint"
    )


def find_restarted(logger: Any, dirpath: str | None = None) -> tuple[Path, int | str | None] | None:
    """Returns what :func:`find_last` does, of the run that this job of SLURM had begun before.

    Args:
        logger: As there.
        dirpath: As there.

    Returns:
        None if the job has left no checkpoint of a run of this command.
    """
    found = _find(logger, dirpath, requeue.is_ours)
    if found is not None:
        rank_zero_info(f"job {requeue.job()} is started again, and goes on from {found[0]}")
    return found


def _find(
    logger: Any, dirpath: str | None, takes: Callable[[Path], bool]
) -> tuple[Path, int | str | None] | None:
    """Returns the newest usable checkpoint of the folders that are taken, and its logs' version."""
    versions = _has_versions(logger)
    if dirpath is not None:
        checkpoint = _newest_usable(list(filter(takes, [expanded(dirpath)])))
        return None if checkpoint is None else (checkpoint, _version(checkpoint) if versions else None)
    runs = _runs_below(_folder_of_runs(logger)) if versions else {}
    checkpoint = _newest_usable(list(filter(takes, runs)))
    return None if checkpoint is None else (checkpoint, runs[checkpoint.parent])


def _has_versions(logger: Any) -> bool:
    """Whether a logger, by its options, is one that keeps its runs in folders ``version_<k>``."""
    options = getattr(logger, "init_args", None)
    if not (hasattr(options, "save_dir") and hasattr(options, "version")):
        return False
    module, _, name = logger.class_path.rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)  # parsing has imported it
    return isinstance(kind, type) and issubclass(kind, TensorBoardLogger | CSVLogger)


def _folder_of_runs(logger: Any) -> Path:
    return expanded(logger.init_args.save_dir) / (logger.init_args.name or "")


def _runs_below(folder: Path) -> dict[Path, int]:
    """The folders of checkpoints in a logger's folder with their versions, the newest first."""
    runs = {}
    for run in folder.glob("version_*/checkpoints"):
        number = run.parent.name.removeprefix("version_")
        if number.isdigit():
            runs[run] = int(number)
    return dict(sorted(runs.items(), key=lambda item: -item[1]))


def _newest_usable(folders: Sequence[Path]) -> Path | None:
    """Returns the first usable checkpoint of folders, else the first one at all; None without any."""
    passed_by: list[tuple[Path, str]] = []
    for folder in folders:
        for path in _latest_first(folder):
            if (reason := unusable_reason(path)) is None:
                if passed_by:
                    first, why = passed_by[0]
                    run = "" if first.parent == folder else " of an earlier run"
                    rank_zero_info(f"--ckpt_path last: {first} {why}; going on from {path}{run}")
                return path
            passed_by.append((path, reason))
    return passed_by[0][0] if passed_by else None


def _latest_first(folder: Path) -> Iterator[Path]:
    """Yields ``last.ckpt``, then the folder's other checkpoints from the latest step on."""
    if (last := folder / LAST_NAME).is_file():
        yield last
    others = [path for path in folder.glob("*.ckpt") if path.name != LAST_NAME and path.is_file()]
    yield from sorted(others, key=lambda path: (-step_of(path), path.name))


def _version(checkpoint: Path) -> int | str | None:
    """Returns the version of the logs stored in a checkpoint."""
    for state in peek(checkpoint).get("callbacks", {}).values():
        if isinstance(state, dict) and state.get(VERSION_KEY) is not None:
            version: int | str = state[VERSION_KEY]
            return version
    return None
