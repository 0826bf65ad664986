"""Which checkpoint ``--ckpt_path`` means, and what is none."""

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info

from moka_pl.errors import ConfigError, one_line
from moka_pl.training.accidents import requeue
from moka_pl.training.checkpoint import LAST_NAME, VERSION_KEY
from moka_pl.training.writing.checkpoint_files import is_remote, peek, step_of, unusable_reason
from moka_pl.utils import expanded

_INSTEAD = "give a .ckpt file, or last"


def check_path(path: str, logger: Any, adapters: str | None = None) -> None:
    """Refuses what is no checkpoint; Lightning does so only after data and model are loaded.

    Args:
        path: What ``--ckpt_path`` is given, other than ``last``.
        logger: The parsed ``trainer.logger``.
        adapters: The folder that the user keeps adapters in (``adapters.dirpath``).

    Raises:
        ConfigError: Naming the path, and what to give in its place.
    """
    if not path.strip():
        raise ConfigError(f"--ckpt_path is empty; {_INSTEAD}, or leave it out")
    if path == "best":
        raise ConfigError(
            "--ckpt_path best: the best weights of a run are kept as an adapter, not as a checkpoint; give "
            f"--model.adapter_path {_best_adapter(logger, adapters)}, a .ckpt file, or last"
        )
    if path == "hpc":
        raise ConfigError(
            f"--ckpt_path hpc: no run writes Lightning's hpc_ckpt files; {_INSTEAD}. A job that SLURM starts "
            "again resumes without --ckpt_path"
        )
    if is_remote(path):
        _check_remote(path)
    elif not Path(path).is_file():
        if re.fullmatch(r"registry(:.*)?", path, re.IGNORECASE) is None:
            raise ConfigError(f"--ckpt_path {path}: {_no_checkpoint(Path(path))}")
        if find_spec("litmodels") is None:
            raise ConfigError(
                f"--ckpt_path {path}: the registry needs the package litmodels, which is not installed; "
                f"{_INSTEAD}"
            )


def say_which_weights(path: str | None, adapter: str | None) -> None:
    """Says which weights are used, where both a checkpoint and an adapter are given.

    A run that began with an adapter goes on, and is evaluated, with both: they are not refused.

    Args:
        path: What ``--ckpt_path`` means.
        adapter: ``model.adapter_path``.
    """
    if path is not None and adapter is not None:
        rank_zero_info(
            f"--model.adapter_path {adapter} gives the options of the adapter only; its weights are those of "
            f"--ckpt_path {path}. Leave that out for the adapter's own"
        )


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


def _runs_below(folder: Path, part: str = "checkpoints") -> dict[Path, int]:
    """The folders of this name in the runs of a logger's folder with their versions, the newest first."""
    runs = {}
    for run in folder.glob("version_*"):
        number = run.name.removeprefix("version_")
        if number.isdigit() and (run / part).exists():
            runs[run / part] = int(number)
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


def _best_adapter(logger: Any, adapters: str | None) -> str:
    """Returns where the newest run's best adapter is, or how such places are called."""
    if adapters is not None:
        return str(expanded(adapters) / "best")
    runs = _runs_below(_folder_of_runs(logger), "adapters/best") if _has_versions(logger) else {}
    return str(next(iter(runs), "RUN/adapters/best"))


def _check_remote(path: str) -> None:
    """Refuses an address at which there is nothing, or which no installed package reads."""
    try:
        reason = None if get_filesystem(path).exists(path) else "nothing is there, or it cannot be reached"
    # Whatever the file systems and their networks raise.
    except Exception as error:
        reason = one_line(error)
    if reason is not None:
        raise ConfigError(f"--ckpt_path {path}: {reason}; {_INSTEAD}")


def _no_checkpoint(path: Path) -> str:
    """Tells what is at a path that is no checkpoint, and where one is near."""
    if not path.is_dir():
        return f"no such file; {_INSTEAD}"
    near = [path, path / "checkpoints", path.parent / "checkpoints", path.parent.parent / "checkpoints"]
    found = next((file for folder in near if (file := folder / LAST_NAME).is_file()), None)
    return f"it is a folder; {_INSTEAD}{f', or {found}' if found else ''}"
