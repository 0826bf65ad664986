"""``moka-pl plan``: what a fit would take, before anything is downloaded."""

import json
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from moka_pl.cli.class_paths import restrict_class_paths, split_trust
from moka_pl.cli.lightning import MokaCLI, refusal
from moka_pl.cli.parsing.parser import MokaParser
from moka_pl.cli.run_folders import RunFolders
from moka_pl.data import MokaDataModule
from moka_pl.errors import ConfigError
from moka_pl.planning.report import make_plan
from moka_pl.training.module import MokaModule
from moka_pl.training.preflight import check_options
from moka_pl.vision import ImageData


def plan(arguments: Sequence[str]) -> None:
    """Prints the plan of the fit that these arguments, without the command, would start.

    Raises:
        ConfigError: If the configuration cannot be read. Errors of the package's classes pass through.
    """
    given, trusted = split_trust(arguments)
    restrict_class_paths(trusted)
    PlanCLI(RunFolders(), ["fit", *given], save_config_callback=None)


class PlanCLI(MokaCLI):
    """The command line of ``fit`` with a trainer that only plans; no folder is made."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of the plan."""
        super().add_arguments_to_parser(parser)
        if isinstance(parser, MokaParser):
            parser.command = "plan"
        parser.add_argument(
            "--tokens_per_second",
            type=float | None,
            default=None,
            help="Rate over all devices, from which the time is estimated.",
        )
        parser.add_argument("--json", action="store_true", help="Print one JSON object, for scripts.")

    def before_instantiate_classes(self) -> None:
        """Refuses what ``fit`` refuses of the trainer's options."""
        options = self._options(self.config)
        check_options(vars(options.trainer))
        rate = options.tokens_per_second
        if rate is not None and not 0 < rate < float("inf"):
            raise ConfigError(f"tokens_per_second must be above 0, not {rate:g}")

    def after_instantiate_classes(self) -> None:
        """Claims no folders."""

    def before_fit(self) -> None:
        """Has nothing to prepare."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Makes what stands in the trainer's place."""
        return self

    def fit(self, model: MokaModule, datamodule: MokaDataModule | ImageData, **options: Any) -> None:
        """Prints the plan, in the place of the trainer's ``fit``.

        Args:
            model: The module.
            datamodule: The data.
            **options: What ``fit`` takes besides.
        """
        if isinstance(datamodule, ImageData):
            raise ConfigError(
                f"plan is for language models, and {type(model).__name__} classifies images; run fit with "
                "--trainer.fast_dev_run true to see its parameters"
            )
        chosen = self._options(self.config)
        try:
            made = make_plan(model, datamodule, vars(chosen.trainer), chosen.tokens_per_second)
        except ValueError as error:
            raise refusal(error) from error
        print(json.dumps(made.to_dict(), indent=2) if chosen.json else made)
