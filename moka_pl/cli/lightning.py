"""LightningCLI with this package's module, data modules, callbacks and logs."""

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
from jsonargparse import ActionConfigFile, Namespace  # type: ignore[attr-defined]
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.callbacks import ProgressBar as LightningBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from moka_pl.callbacks import (
    AdapterCheckpoint,
    BaseScores,
    BatchStatistics,
    Dashboard,
    EvaluationTable,
    ExamplePrinter,
    GateMonitor,
    GracefulInterrupt,
    MonitorCheck,
    ProgressBar,
    RunCheckpoint,
    RunSummary,
    Throughput,
)
from moka_pl.cli.checkpoint_path import check_path, find_last, find_restarted, say_which_weights
from moka_pl.cli.class_paths import names_kind, restrict_class_paths, split_trust
from moka_pl.cli.config_files import named_model, read_config
from moka_pl.cli.configs import find_config
from moka_pl.cli.failures import ranks, watch
from moka_pl.cli.failures.log_writers import log_writers
from moka_pl.cli.parsing.messages import told
from moka_pl.cli.parsing.parser import MokaParser
from moka_pl.cli.run_folders import RunFolders
from moka_pl.data import MokaDataModule
from moka_pl.data.batching.loader import killed_worker
from moka_pl.errors import ConfigError, MokaError, one_line
from moka_pl.evaluation.memory import is_out_of_memory
from moka_pl.training.accidents import requeue
from moka_pl.training.module import MokaModule
from moka_pl.training.preflight import check_accelerator, check_evaluation, check_launcher, check_options
from moka_pl.training.trial_optimizer import check_learns
from moka_pl.training.writing.checkpoint_files import read_checkpoint
from moka_pl.utils import ended_by_signals, expanded, make_folder
from moka_pl.vision import ImageData, VisionModule

_LOGGER = {
    "class_path": "moka_pl.callbacks.BoardLogger",
    "init_args": {"save_dir": "lightning_logs", "name": "moka", "default_hp_metric": False},
}


#: What the paths of our own classes begin with.
_OURS = "moka_pl."

#: Callbacks with options of their own, by the options' names.
_CALLBACKS = {
    "gates": GateMonitor,
    "adapters": AdapterCheckpoint,
    "checkpoint": RunCheckpoint,
    "example": ExamplePrinter,
    "base_scores": BaseScores,
}


def run(arguments: Sequence[str] | None = None, only_build: bool = False) -> "MokaCLI":
    """Parses the arguments (default: the process's) and runs the Lightning command they name.

    With ``only_build`` they name no command; model, data and trainer are made, and nothing is run.

    Raises:
        ConfigError: If Lightning rejects the trainer's options. Errors of the package's classes pass through.
        KeyboardInterrupt: If a signal has ended the run, with everything saved.
    """
    given, trusted = split_trust(sys.argv[1:] if arguments is None else arguments)
    restrict_class_paths(trusted)
    try:
        with ended_by_signals(), log_writers(), RunFolders() as folders:
            saving = {"save_config_callback": _SavedConfig, "save_config_kwargs": {"overwrite": True}}
            return MokaCLI(folders, given, run=not only_build, **saving)
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning ends the process with status 1
            raise end.__context__ from None
        raise
    except MisconfigurationException as error:
        raise ConfigError(one_line(error)) from error
    except (RuntimeError, MemoryError) as error:
        if is_out_of_memory(error):  # training steps and evaluations say more of theirs
            raise ConfigError(
                "out of memory outside of training steps. Free memory of the device, choose a smaller "
                f"--model.backbone.name, or --trainer.strategy sharded_offload. ({one_line(error)})"
            ) from error
        # Its death is told by a signal, and so may interrupt anything.
        if (killed := killed_worker(error)) is not None:
            raise killed from error
        if str(error).startswith("Early stopping conditioned on metric"):
            raise ConfigError(one_line(error)) from error
        raise


def refusal(error: Exception) -> Exception:
    """Returns what a class that was built refused, out of what jsonargparse wraps it in."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, MokaError | OSError):
        cause = cause.__cause__
    return cause if isinstance(cause, MokaError | OSError) else ConfigError(told(one_line(error)))


class _ConfigFile(ActionConfigFile):
    """Finds the package's configurations by their names, too."""

    def __call__(self, parser: Any, cfg: Any, values: Any, option_string: str | None = None) -> None:
        found = find_config(values)
        if Path(found).is_file():
            read_config(Path(found), "--config")
        super().__call__(parser, cfg, found, option_string)  # type: ignore[no-untyped-call]


class _SavedConfig(SaveConfigCallback):
    """Saves the configuration, and leaves a run's config.yaml what it is: the run from its beginning."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Saves it under another name if a fit goes on, and not at all if the run is only evaluated."""
        log_dir = str(trainer.log_dir)  # on every rank: Lightning broadcasts it
        first = trainer.is_global_zero
        begun = first and get_filesystem(log_dir).exists(f"{log_dir}/{self.config_filename}")
        if trainer.strategy.broadcast(begun):
            if stage != "fit":
                return
            if pl_module.resumes:
                self.config_filename = "config_resumed.yaml"
        super().setup(trainer, pl_module, stage)


class MokaCLI(LightningCLI):
    """Adds the callbacks' options, a TensorBoard logger, and resuming by ``--ckpt_path last``.

    The model is a :class:`MokaModule`, whose options need no ``class_path``, unless the command line or one
    of its files names another class, such as ``moka_pl.VisionModule``.

    Args:
        folders: Holds the folders of the run.
        args: The arguments, the command among them.
        **kwargs: What else Lightning's command line takes.
    """

    def __init__(self, folders: RunFolders, args: Sequence[str], **kwargs: Any) -> None:
        self._folders = folders
        #: Options of loggers that go on with a run, and the versions that were given for them.
        self._given_versions: list[tuple[Namespace, Any]] = []
        self._first = next(iter(args), "")
        named = named_model(args)
        super().__init__(
            MokaModule,
            ImageData if named is not None and names_kind(named, VisionModule) else MokaDataModule,
            subclass_mode_model=named is not None,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            parser_kwargs={"prog": "moka_pl", "allow_abbrev": False},
            args=list(args),
            **kwargs,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Returns Lightning's commands but ``predict``, whose results nothing would write.

        Where the command comes first, as it mostly does, it is the only one: a parser takes 0.1 seconds.
        """
        commands = LightningCLI.subcommands()
        del commands["predict"]
        return {self._first: commands[self._first]} if self._first in commands else commands

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser whose ``--config`` takes names of the package's configurations, too."""
        parser = MokaParser(dump_header=[f"lightning.pytorch=={lightning.__version__}"], **kwargs)
        parser.add_argument(
            "-c",
            "--config",
            action=_ConfigFile,
            help="A YAML file, or a name from 'moka_pl configs', such as llama2. Classes in it must be of "
            "installed packages, unless --trust_config true stands on the command line, too.",
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds options and defaults beside Lightning's own."""
        for name, kind in _CALLBACKS.items():
            parser.add_class_arguments(kind, name, fail_untyped=False, sub_configs=True)
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

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses them, and reports a damaged checkpoint, or one that is none, before Lightning reads it."""
        try:
            # Not by Lightning's method, which warns of arguments that are not the process's own.
            self.config = parser.parse_args(args)
        except MokaError:
            raise
        except Exception as error:  # jsonargparse expects some mistakes only
            raise ConfigError(f"the configuration cannot be read: {told(one_line(error))}") from error
        options = self._options(self.config)
        for name in ("model", "trainer", *_CALLBACKS):
            if name in options and not isinstance(options[name], Namespace):
                raise ConfigError(f"{name} must be a mapping of options, not {options[name]!r}")
        model = options.model.get("init_args") or options.model
        for name in ("optimizer", "lr_scheduler", "backbone", "learning_rate_ratios", "loss_spikes"):
            if model.get(name, name) is None:
                raise ConfigError(f"model.{name} is null; leave it out for the default")
        seed = options.get("seed_everything")
        if not isinstance(seed, bool | None) and not 0 <= seed < 1 << 32:
            raise ConfigError(f"seed_everything must be from 0 to {(1 << 32) - 1}, not {seed}")
        path = options.get("ckpt_path")
        if path is not None and path.startswith("~"):
            path = options.ckpt_path = str(expanded(path))
        if path is not None and Path(path).is_file():
            read_checkpoint(Path(path))

    def instantiate_classes(self) -> None:
        """Builds model, data and trainer, and reports in one line what one of their classes refuses."""
        options = self._options(self.config)
        named = [getattr(part, "class_path", _OURS) for part in (options.model, options.get("data"))]
        if all(name.startswith(_OURS) for name in named):
            # What classes would find in it that call `save_hyperparameters`; it takes 0.1 seconds to write.
            self.config_dump: dict[str, Any] = {}
        try:
            super().instantiate_classes()
        except Exception as error:
            raise refusal(error) from error

    @staticmethod
    def _options(config: Namespace) -> Namespace:
        """Returns the options of the command; where none is to run, they stand alone."""
        command = config.get("subcommand")
        return config[command] if command else config

    def before_instantiate_classes(self) -> None:
        """Resolves ``ckpt_path: last`` to the newest run of the same name, and continues its logs."""
        config = self._options(self.config)
        if self.config.get("subcommand") == "fit":
            check_options(vars(config.trainer))
            check_accelerator(config.trainer.accelerator)
        if "weights_only" in config:
            config.weights_only = True  # nothing is unpickled from a path that the user gives
        if "verbose" in config:
            config.verbose = False  # EvaluationTable prints what was found, in a form to be read
        given = config.trainer.logger
        loggers = given if isinstance(given, list) and given else [given]
        logger = loggers[0]  # which decides where checkpoints are
        folder = getattr(getattr(logger, "init_args", None), "save_dir", None)
        if logger is False:
            # Lightning would write config.yaml into the current folder.
            self.save_config_callback = None
        elif folder is not None and "://" not in str(folder) and not config.trainer.get("fast_dev_run"):
            make_folder(expanded(folder), "--trainer.logger.init_args.save_dir")
        path = config.get("ckpt_path")
        if path not in (None, "last"):
            check_path(path, logger, config.adapters.dirpath)
        keeping = config.trainer.enable_checkpointing is not False
        dirpath = config.checkpoint.dirpath if keeping else None
        found = None
        if path == "last":
            found = find_last(logger, dirpath)
        elif path is None and self.config.get("subcommand") == "fit" and requeue.restarted():
            found = find_restarted(logger, dirpath)
        if found is not None:
            checkpoint, version = found
            config.ckpt_path = str(checkpoint)
            if version is not None:
                for one in [one.init_args for one in loggers if _is_beside(one, logger)]:
                    self._given_versions.append((one, one.version))
                    one.version = version
        model = config.model.get("init_args") or config.model
        say_which_weights(config.get("ckpt_path"), model.get("adapter_path"))

    def after_instantiate_classes(self) -> None:
        """Claims the folders of the run, before anything is read or computed."""
        if self.subcommand is not None:
            if self.subcommand != "fit":
                check_evaluation(self.trainer, self.subcommand)
            check_launcher(self.trainer)
            ranks.join(self.trainer)
            watch.begin(self.trainer)
            resumed = self._options(self.config).get("ckpt_path") is not None
            for logger, version in self._given_versions:  # the saved configuration is for other runs, too
                logger.version = version
            self._folders.prepare(self.trainer, self.subcommand == "fit", resumed)

    def before_fit(self) -> None:
        """Tells the module whether a checkpoint follows; Lightning (2.6) says so only when it is built."""
        check_learns(self.model, self.trainer.strategy.root_device)
        self.model.resumes = self._options(self.config).get("ckpt_path") is not None
        trainer_options = vars(self._options(self.config).trainer)

        def describe(rows: int, tokens: int, trained: int) -> str:
            from moka_pl.planning.estimator import describe_batch

            return describe_batch(self.model, trainer_options, rows, tokens, trained)

        self.model.describe_memory = describe
        self._name_checkpoint()

    def _name_checkpoint(self) -> None:
        """Tells the module which checkpoint follows, if it is a local file."""
        path = self._options(self.config).get("ckpt_path")
        if path is not None and Path(path).is_file():
            self.model.checkpoint_path = Path(path)

    before_validate = before_test = _name_checkpoint

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Makes the trainer with our callbacks, but none of a kind that the user gave or switched off."""
        built = self._options(self.config_init)
        options = built.trainer
        given = options.callbacks or []
        kinds = [type(callback) for callback in (given if isinstance(given, list) else [given])]
        ours = [
            Throughput(),
            BatchStatistics(),
            RunSummary(),
            GracefulInterrupt(),
            EvaluationTable(),
            Dashboard(),
        ]
        ours.insert(0, MonitorCheck())
        if options.enable_progress_bar is not False and not any(issubclass(k, LightningBar) for k in kinds):
            ours.insert(0, ProgressBar())
        configured = [built[name] for name in _CALLBACKS]
        if options.enable_checkpointing is False:
            configured = [callback for callback in configured if not isinstance(callback, Checkpoint)]
        self.trainer_defaults["callbacks"] = configured + [c for c in ours if type(c) not in kinds]
        with _without_tips():
            return super().instantiate_trainer(**kwargs)


def _is_beside(logger: Any, first: Any) -> bool:
    """Whether a logger, by its options, writes to the same versions as the first one."""
    if not hasattr(logger, "init_args"):
        return False  # true or false
    options, beside = vars(logger.init_args), vars(first.init_args)
    return all(name in options and options[name] == beside[name] for name in ("save_dir", "name", "version"))


@contextmanager
def _without_tips() -> Iterator[None]:
    """Runs the body without what Lightning (2.6) advertises in the log of every trainer."""

    def no_tip(record: logging.LogRecord) -> bool:
        return "Tip:" not in record.getMessage()

    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(no_tip)
    try:
        yield
    finally:
        log.removeFilter(no_tip)


def _data_seed(seed: bool | int) -> int:
    return 0 if isinstance(seed, bool) else seed
