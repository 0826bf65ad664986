"""LightningCLI with this package's module, data modules, callbacks and logs."""

from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from moka_pl.callbacks import (
    AdapterCheckpoint,
    BatchStatistics,
    EvaluationTable,
    GateMonitor,
    GracefulInterrupt,
    ProgressBar,
    RunCheckpoint,
    RunSummary,
    Throughput,
)
from moka_pl.cli.functions import FUNCTIONS, function_parser
from moka_pl.cli.parser import MokaParser
from moka_pl.data import MokaDataModule
from moka_pl.errors import ConfigError, MokaError
from moka_pl.training.checkpoint import find_last
from moka_pl.training.module import MokaModule
from moka_pl.utils import make_folder

_LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": "lightning_logs", "name": "moka", "default_hp_metric": False},
}


def run(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments (default: the process's) and runs the Lightning command they name.

    Raises:
        ConfigError: For what Lightning finds wrong with the trainer's options.
    """
    _make(MokaCLI, arguments)


def build(arguments: Sequence[str]) -> "MokaCLI":
    """Parses the arguments and makes model, data and trainer (its attributes) without running anything."""
    return _make(_Built, arguments)


def _make(kind: "type[MokaCLI]", arguments: Sequence[str] | None) -> "MokaCLI":
    try:
        return kind(
            MokaModule,
            MokaDataModule,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_class=MokaParser,
            parser_kwargs={
                "prog": "moka_pl",
                "description": "Fine-tune 4-bit LLaMA models with MoKA.",
                "allow_abbrev": False,
            },
            args=None if arguments is None else list(arguments),
        )
    except MisconfigurationException as error:
        raise ConfigError(" ".join(str(error).split())) from error
    except ValueError as error:
        # jsonargparse wraps what a class refuses when it is built.
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, MokaError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None


class MokaCLI(LightningCLI):
    """Adds the callbacks' options, a TensorBoard logger, and resuming by ``--ckpt_path last``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds options and defaults beside Lightning's own."""
        parser.add_lightning_class_args(GateMonitor, "gates")
        parser.add_lightning_class_args(AdapterCheckpoint, "adapters")
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                # With save_top_k: 0 Lightning (2.6) writes last.ckpt only when training ends; with its
                # version counter a resumed run would write last-v1.ckpt beside an outdated last.ckpt.
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 1,
                "checkpoint.enable_version_counter": False,
                "trainer.logger": _LOGGER,
                "trainer.max_epochs": 1,
                "trainer.log_every_n_steps": 10,
                "trainer.num_sanity_val_steps": -1,
                "trainer.enable_model_summary": False,
            }
        )
        # One seed for everything: the order of the data as well as the start of the adapters.
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=_data_seed)

    def _add_subcommands(self, parser: LightningArgumentParser, **kwargs: Any) -> None:
        """Lists the plain functions in ``--help`` beside Lightning's commands."""
        super()._add_subcommands(parser, **kwargs)
        listed: Any = parser._subcommands_action
        for name in FUNCTIONS:
            command = function_parser(name)
            listed.add_subcommand(name, command, help=command.description)

    def _parse_ckpt_path(self) -> None:
        """Reports a damaged checkpoint, or one that is none, which Lightning looks into first."""
        try:
            super()._parse_ckpt_path()
        except (RuntimeError, UnpicklingError, EOFError) as error:
            path = self.config[self.config.subcommand].ckpt_path
            reason = str(error).split("\n", 1)[0].strip()
            raise ConfigError(f"--ckpt_path {path} is damaged or no checkpoint ({reason})") from error

    def before_instantiate_classes(self) -> None:
        """Resolves ``ckpt_path: last`` to the newest run of the same name, and continues its logs."""
        config = self.config[self.subcommand]
        config.weights_only = True  # nothing is unpickled from a path that the user gives
        if "verbose" in config:
            config.verbose = False  # EvaluationTable prints what was found, in a form to be read
        logger = config.trainer.logger
        if logger is False:
            # Lightning would write config.yaml into the current folder.
            self.save_config_callback = None
        elif (folder := _save_dir(logger)) and not config.trainer.get("fast_dev_run"):
            make_folder(folder, "--trainer.logger.init_args.save_dir")
        path = config.get("ckpt_path")
        special = path in (None, "best", "last", "hpc") or "://" in path or path.startswith("registry")
        if not special and not Path(path).is_file():
            raise ConfigError(f"--ckpt_path {path}: no such file; give a .ckpt file, or last")
        if path == "last":
            keeping = config.trainer.enable_checkpointing is not False
            found = find_last(config.trainer.logger, config.checkpoint.dirpath if keeping else None)
            config.ckpt_path = str(found.checkpoint)
            if found.version is not None:
                config.trainer.logger.init_args.version = found.version
            # The folder's config.yaml stays what it is: the run from its beginning.
            self.save_config_kwargs["config_filename"] = "config_resumed.yaml"

    def before_fit(self) -> None:
        """Tells the module whether a checkpoint follows; Lightning (2.6) says so only when it is built."""
        self.model.resumes = self.config[self.subcommand].get("ckpt_path") is not None

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        """Adds our callbacks, but none of a kind that the user has chosen or switched off."""
        given = config["callbacks"] or []
        kinds = [type(callback) for callback in (given if isinstance(given, list) else [given])]
        ours = [Throughput(), BatchStatistics(), RunSummary(), GracefulInterrupt(), EvaluationTable()]
        if config["enable_progress_bar"] is not False and not any(issubclass(k, LightningBar) for k in kinds):
            ours.insert(0, ProgressBar())
        if config["enable_checkpointing"] is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint)]
        self.trainer_defaults["callbacks"] = [c for c in ours if type(c) not in kinds]
        return super()._instantiate_trainer(config, callbacks)


class _Built(MokaCLI):
    """Stops where a command would begin."""

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _save_dir(logger: object) -> Path | None:
    """The folder of a logger's configuration, where it has one."""
    options = getattr(logger, "init_args", None)
    folder = getattr(options, "save_dir", None)
    return None if folder is None or "://" in str(folder) else Path(folder)


def _data_seed(seed: bool | int) -> int:
    return 0 if isinstance(seed, bool) else seed
