"""LightningCLI with this package's module, data modules, callbacks and logs."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from moka_pl.callbacks import (
    AdapterCheckpoint,
    GateMonitor,
    GracefulInterrupt,
    ProgressBar,
    RunSummary,
    Throughput,
)
from moka_pl.cli import FUNCTIONS, function_parser
from moka_pl.data import MokaDataModule
from moka_pl.module import MokaModule
from moka_pl.resume import find_last

_LOGGER = {
    "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
    "init_args": {"save_dir": "lightning_logs", "name": "moka", "default_hp_metric": False},
}


def run(arguments: Sequence[str] | None = None) -> None:
    """Parses the arguments (default: the process's) and runs the Lightning command they name."""
    MokaCLI(
        MokaModule,
        MokaDataModule,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_kwargs={"overwrite": True},
        trainer_defaults={"callbacks": [ProgressBar(), Throughput(), RunSummary(), GracefulInterrupt()]},
        parser_kwargs={"prog": "moka_pl", "description": "Fine-tune 4-bit LLaMA models with MoKA."},
        args=None if arguments is None else list(arguments),
    )


class MokaCLI(LightningCLI):
    """Adds the callbacks' options, a TensorBoard logger, and resuming by ``--ckpt_path last``."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds options and defaults beside Lightning's own."""
        parser.add_lightning_class_args(GateMonitor, "gates")
        parser.add_lightning_class_args(AdapterCheckpoint, "adapters")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 0,
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

    def before_instantiate_classes(self) -> None:
        """Resolves ``ckpt_path: last`` to the newest run of the same name, and continues its logs."""
        config = self.config[self.subcommand]
        config.weights_only = True  # nothing is unpickled from a path that the user gives
        if config.get("ckpt_path") == "last":
            found = find_last(config.trainer.logger)
            config.ckpt_path = str(found.checkpoint)
            config.trainer.logger.init_args.version = found.version


def _data_seed(seed: bool | int) -> int:
    return 0 if isinstance(seed, bool) else seed
