"""Builds modules, data modules and trainers from a suite's settings, by the rules of the command line."""

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentError, Namespace
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from moka_pl.backbone import BackboneConfig
from moka_pl.cli.class_paths import restrict_class_paths
from moka_pl.cli.parsing.messages import told
from moka_pl.cli.parsing.parser import MokaParser
from moka_pl.data import MokaDataModule
from moka_pl.errors import ConfigError, MokaError
from moka_pl.planning.adapters import plan_adapters
from moka_pl.planning.shape import empty_model
from moka_pl.studies.common import silenced_lightning
from moka_pl.studies.compare.runs import Run, run_of
from moka_pl.studies.compare.shared_base import ComparedModule
from moka_pl.studies.compare.suite import Settings, Suite, merged

_TRAINER: Settings = {
    "accelerator": "auto",
    "devices": 1,
    "max_epochs": 1,
    "log_every_n_steps": 10,
    "num_sanity_val_steps": 0,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}
_OPTIMIZER: Settings = {"class_path": "torch.optim.AdamW", "init_args": {"weight_decay": 0.0}}


def build_module(run: Run, adapter: Path | None = None) -> ComparedModule:
    """The module of a run, with its learning rate.

    Args:
        run: The run.
        adapter: The adapter directory that an earlier training of it left, to start from.

    Raises:
        ConfigError: If an option is unknown or has a wrong value.
    """
    training = run.settings["training"]
    optimizer = merged(training.get("optimizer") or _OPTIMIZER, {"init_args": {"lr": run.rate or 0.0}})
    model = {
        "backbone": run.settings["backbone"],
        "adapter": run.settings["adapter"],
        "optimizer": optimizer,
    }
    for option in ("lr_scheduler", "gradient_checkpointing", "cuda_graphs"):
        if option in training:
            model[option] = training[option]
    if "learning_rate_ratios" in run.settings:
        model["learning_rate_ratios"] = run.settings["learning_rate_ratios"]
    if adapter is not None:
        model["adapter_path"] = str(adapter)
    built = _instantiate(_module_parser(), {"model": model}, f"method {run.method}").model
    assert isinstance(built, ComparedModule)
    return built


def build_data(settings: Settings) -> MokaDataModule:
    """A data module.

    Raises:
        ConfigError: If an option is unknown or has a wrong value.
    """
    built = _instantiate(_data_parser(), {"data": settings}, "data").data
    assert isinstance(built, MokaDataModule)
    return built


def backbone_of(settings: Settings) -> BackboneConfig:
    """The options of a base model.

    Raises:
        ConfigError: If an option is unknown or has a wrong value.
    """
    backbone = _instantiate(_module_parser(), {"model": {"backbone": settings}}, "backbone").model.backbone
    assert isinstance(backbone, BackboneConfig)
    return backbone


def build_trainer(run: Run, folder: Path, callbacks: Sequence[Callback] = ()) -> Trainer:
    """A trainer that logs to the run's folder.

    Args:
        run: Its ``training.trainer`` holds options of Lightning's trainer.
        folder: Folder of the run.
        callbacks: What else the trainer calls.
    """
    logger = TensorBoardLogger(folder.parent, name=folder.name, version="", default_hp_metric=False)
    options = run.settings["training"].get("trainer", {})
    return _make_trainer(options | {"logger": logger, "callbacks": list(callbacks)})


def check_suite(suite: Suite) -> None:
    """Builds everything but models, so that a wrong option shows before the first run.

    Raises:
        ConfigError: Naming the method and the option.
    """
    for method in suite.methods:
        run = run_of(suite, method, method.learning_rates[0], suite.seeds[0])
        optimizer = build_module(run).optimizer
        assert callable(optimizer)
    with silenced_lightning():
        _make_trainer(suite.training.get("trainer", {}) | {"logger": False})
    for settings in (suite.data, suite.test, suite.forgetting):
        if settings is not None:
            build_data(settings)
    sets, named = build_data(suite.test or suite.data).eval_sets, suite.generate.get("tasks", [])
    if named and len(named) != len(sets):
        raise ConfigError(
            f"generate.tasks names {len(named)} sets, but the test has {len(sets)}: one name each"
        )
    if suite.test is None and not build_data(suite.data).separate_test:
        raise ConfigError(
            "the learning rate would be picked on the test data: set data.init_args.separate_test: true, or "
            "name other data by test"
        )


def check_methods(suite: Suite) -> None:
    """Puts every method's adapter into its base without weights: what a layer refuses shows before any run.

    Raises:
        ConfigError: Naming the method.
    """
    for method in suite.methods:
        module = build_module(run_of(suite, method, method.learning_rates[0], suite.seeds[0]))
        try:
            model, _ = empty_model(module.backbone, torch.float32, [])
            plan_adapters(model, module.adapter, None, torch.float32.itemsize, [])
        except MokaError as error:
            raise ConfigError(f"{suite.name}: method {method.name}: {error}") from error


def _make_trainer(options: Settings) -> Trainer:
    try:
        return Trainer(**(_TRAINER | options))
    except (TypeError, ValueError, MisconfigurationException) as error:
        raise ConfigError(f"training.trainer does not fit Lightning's trainer: {error}") from error


@cache
def _module_parser() -> MokaParser:
    parser = MokaParser(exit_on_error=False)
    parser.add_class_arguments(ComparedModule, "model")
    return parser


@cache
def _data_parser() -> MokaParser:
    parser = MokaParser(exit_on_error=False)
    parser.add_subclass_arguments(MokaDataModule, "data", required=True)
    return parser


def _instantiate(parser: MokaParser, written: dict[str, Any], what: str) -> Namespace:
    restrict_class_paths()
    try:
        # A copy: parsing changes lists in place.
        built: Namespace = parser.instantiate_classes(parser.parse_object(deepcopy(written)))
        return built
    except (ArgumentError, TypeError, ValueError) as error:
        cause: BaseException | None = error  # jsonargparse wraps what a class refuses
        while cause is not None and not isinstance(cause, MokaError):
            cause = cause.__cause__
        raise ConfigError(f"{what}: {told(' '.join(str(cause or error).split()))}") from error
