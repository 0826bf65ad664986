"""The folders that a run writes to: a version of its own, made and locked before anything is computed."""

import fcntl
import json
import os
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger

from moka_pl._compat import logger_version, set_logger_version
from moka_pl.callbacks import AdapterCheckpoint, RunCheckpoint
from moka_pl.cli.csv_tables import keep_table
from moka_pl.errors import ConfigError
from moka_pl.training.trainer_state import is_trial
from moka_pl.utils import expanded, unwritable_reason

#: Tells the processes that the first rank starts which versions it has claimed, by their folders.
_VARIABLE = "MOKA_PL_LOG_VERSIONS"

#: Callbacks that write under fixed names, with the option of their folder.
_OWN: dict[type, str] = {AdapterCheckpoint: "--adapters.dirpath", RunCheckpoint: "--checkpoint.dirpath"}


class RunFolders:
    """The folders of one run, held until it ends: no other run writes to them meanwhile.

    A folder is held by a lock of its open descriptor, which the system gives back when the process ends,
    however it ends. What was made and has stayed empty is removed again.
    """

    def __init__(self) -> None:
        self._held = ExitStack()
        self._versions: dict[str, int] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._held.close()

    def prepare(self, trainer: Trainer, training: bool, resumed: bool) -> None:
        """Claims versions for the loggers, and tries and holds what a training will write to.

        Args:
            trainer: The trainer of the run.
            training: Whether it trains; other commands only log.
            resumed: Whether it goes on from a checkpoint, so that a version that is given may exist.

        Raises:
            ConfigError: If a folder cannot be written to, or belongs to another run.
        """
        first = trainer.is_global_zero
        if not first:
            self._versions = json.loads(os.environ.get(_VARIABLE, "{}"))
        folders = [
            self._version_folder(logger, first, training and not resumed) for logger in trainer.loggers
        ]
        if first and self._versions:
            os.environ[_VARIABLE] = json.dumps(self._versions)
            self._held.callback(os.environ.pop, _VARIABLE, None)
        for logger in trainer.loggers if first else ():
            keep_table(logger)
        if not first or not training or is_trial(trainer):
            return
        ours = [("the log folder", folder) for folder in dict.fromkeys(folders) if folder is not None]
        others = _folders_of_callbacks(trainer)
        ours += [(option, others.pop(option)) for option in _OWN.values() if option in others]
        for option, folder in (*ours, *others.items()):
            self._make(folder, option)
        for option, folder in ours:
            self._lock(folder, option)

    def _version_folder(self, logger: Logger, first: bool, must_be_new: bool) -> Path | None:
        """Returns a logger's folder, with a version of its own; None if it is not ours to choose."""
        if not isinstance(logger, TensorBoardLogger | CSVLogger) or "://" in str(logger.root_dir):
            return None
        root = expanded(os.path.expandvars(logger.root_dir))
        version = logger_version(logger)
        if version is not None:
            folder = root / (version if isinstance(version, str) else f"version_{version}")
            # A job that is started again by its cluster goes on under its own number.
            if first and must_be_new and "SLURM_RESTART_COUNT" not in os.environ and _has_files(folder):
                raise ConfigError(
                    f"--trainer.logger.init_args.version {version}: {folder} holds a run already; choose "
                    "another version, leave it out, or resume that run with --ckpt_path last"
                )
            return folder
        if first and str(root) not in self._versions:
            self._versions[str(root)] = self._claim(root)
        if str(root) in self._versions:
            set_logger_version(logger, self._versions[str(root)])
        return root / f"version_{self._versions.get(str(root), 0)}"

    def _claim(self, root: Path) -> int:
        """Makes the folder of the next version, which no other process can make, too."""
        self._make(root, "--trainer.logger.init_args.save_dir")
        names = [path.name.removeprefix("version_") for path in root.glob("version_*")]
        version = max((int(name) for name in names if name.isdecimal()), default=-1) + 1
        while True:
            folder = root / f"version_{version}"
            try:
                folder.mkdir()
            except FileExistsError:
                version += 1
            except FileNotFoundError:  # another run has just removed the empty folder
                self._make(root, "--trainer.logger.init_args.save_dir")
            except OSError as error:
                raise ConfigError(
                    f"cannot make {folder} ({error.strerror or error}); choose another folder"
                ) from error
            else:
                self._held.callback(_remove_empty, [folder])
                return version

    def _make(self, folder: Path, option: str) -> None:
        """Makes a folder, tries it, and sees that nothing empty is left of it in the end."""
        with suppress(OSError):
            missing = [path for path in (folder, *folder.parents) if not path.exists()]
            self._held.callback(_remove_empty, missing)
        if (reason := unwritable_reason(folder)) is not None:
            raise ConfigError(f"{option} {folder}: cannot write there ({reason}); choose another folder")

    def _lock(self, folder: Path, option: str) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        _descriptors.add(descriptor)
        self._held.callback(_close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"{option} {folder}: another process trains there; wait for its end, or choose another "
                "folder (without --ckpt_path every run gets a version of its own)"
            ) from None
        except OSError:
            pass  # some network file systems know no locks; the version is the run's own all the same


#: What holds the locks. The processes that load data would inherit them, and may outlive a killed run.
_descriptors: set[int] = set()


def _close(descriptor: int) -> None:
    if descriptor in _descriptors:
        _descriptors.remove(descriptor)
        os.close(descriptor)


def _close_inherited() -> None:
    while _descriptors:
        os.close(_descriptors.pop())


os.register_at_fork(after_in_child=_close_inherited)


def _folders_of_callbacks(trainer: Trainer) -> dict[str, Path]:
    """Returns the folders that callbacks and the profiler are to write to, by option."""
    found: dict[str, Path] = {}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        kind, given = type(callback), getattr(callback, "dirpath", None)
        if isinstance(given, str | os.PathLike) and "://" not in str(given):
            found[_OWN.get(kind, f"dirpath of {kind.__name__}")] = expanded(given)
        elif kind in _OWN and not trainer.loggers:
            name = "adapters" if kind is AdapterCheckpoint else "checkpoints"
            found[_OWN[kind]] = Path(trainer.default_root_dir) / name
    profiles = getattr(trainer.profiler, "dirpath", None)  # type: ignore[attr-defined]
    return found if profiles is None else found | {"--trainer.profiler": Path(profiles)}


def _has_files(folder: Path) -> bool:
    try:
        return any(folder.iterdir())
    except OSError:
        return False


def _remove_empty(folders: list[Path]) -> None:
    """Removes folders, the innermost first, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
