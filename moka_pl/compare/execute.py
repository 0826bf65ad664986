"""Trains and tests single runs in this process, with one base and one set of tokenised data."""

import json
import logging
import math
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer, seed_everything
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from moka_pl.adapters import method_of
from moka_pl.benchmark.bench import first_line
from moka_pl.benchmark.machine import device_name
from moka_pl.callbacks import GateMonitor
from moka_pl.callbacks.evaluation import results_dict
from moka_pl.checkpoint import check_trainable_state
from moka_pl.compare.base import SharedBase
from moka_pl.compare.build import build_data, build_module, build_trainer
from moka_pl.compare.data import PreparedData
from moka_pl.compare.module import ComparedModule
from moka_pl.compare.runs import Run
from moka_pl.compare.store import Outcome, Store
from moka_pl.compare.suite import Settings
from moka_pl.errors import ConfigError
from moka_pl.events import scalar_events

WEIGHTS = "weights.safetensors"
_LOGGERS = ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero")


class Executor:
    """Does runs one after another and writes down what became of them.

    Args:
        store: Where outcomes go.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.base = SharedBase()
        self._data: dict[str, PreparedData] = {}

    def __call__(self, run: Run, test: bool) -> Outcome:
        """Trains a run, unless it is trained already, and tests it if that is wanted.

        Args:
            run: What to do.
            test: Whether to test it, too.

        Returns:
            The outcome, which is stored, too; of a run that failed it holds ``error``.
        """
        outcome = {key: part for key, part in self.store.read(run).items() if key in ("trained", "tested")}
        try:
            with _quiet():
                self._execute(run, test, outcome)
        except Exception as error:
            outcome["error"] = first_line(error)
            self.store.write(run, outcome)
        finally:
            self.base.restore()
        return outcome

    def _execute(self, run: Run, test: bool, outcome: Outcome) -> None:
        folder = self.store.path(run)
        module = build_module(run)
        module.shared = self.base
        if "trained" not in outcome:
            shutil.rmtree(folder, ignore_errors=True)  # curves of an attempt that did not end
        gates = (
            []
            if run.rate is None or "class_path" in run.settings["adapter"]
            else [GateMonitor(heatmap=False)]
        )
        trainer = build_trainer(run, folder, gates)
        # First of all, so that no random number is drawn between the seed and the adapters' start.
        tokenizer = self.base.get(module.backbone, trainer.strategy.root_device).tokenizer
        if "trained" not in outcome:
            outcome["trained"] = self._train(run, module, trainer, tokenizer, folder)
            self.store.write(run, outcome)
        elif test:
            if run.rate is not None:
                module.take_over(weights_options(folder / WEIGHTS))
            module.configure_model()
            if run.rate is not None:
                load_weights(module, folder / WEIGHTS)
        if test and not self.store.is_tested(run):
            start = time.monotonic()
            data = self._prepared(run.test, run, tokenizer, "test")
            trainer.test(module, datamodule=data, verbose=False)
            assert module.eval_results is not None
            outcome["tested"] = {
                "key": run.test_key,
                "seconds": time.monotonic() - start,
                **results_dict(module.eval_results),
                "items": module.items,
            }
            self.store.write(run, outcome)

    def _train(
        self, run: Run, module: ComparedModule, trainer: Trainer, tokenizer: Any, folder: Path
    ) -> dict[str, Any]:
        about = {"device": device_name(trainer.strategy.root_device.type)}
        if run.rate is None:
            module.configure_model()
            return about | {"parameters": 0, "seconds": 0.0}
        data = self._prepared(run.settings["data"], run, tokenizer, "fit").order(run.seed)
        seed_everything(run.seed, verbose=False)
        start = time.monotonic()
        trainer.fit(module, datamodule=data)
        steps = trainer.global_step
        if module.eval_step != steps or "val/loss" not in module.eval_values:
            trainer.validate(module, datamodule=data, verbose=False)
        values = module.eval_values
        if "val/loss" not in values:
            raise ConfigError("there are no validation data to pick the learning rate with")
        save_weights(module, folder / WEIGHTS)
        return about | {
            "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "steps": steps,
            "seconds": time.monotonic() - start,
            "batches": module.batches,
            "validation_loss": _number(values["val/loss"]),
            "validation_acc_norm": values.get("val/acc_norm"),
            "losses": _finite(scalar_events(folder, "train/loss")),
            "validation_losses": _finite(scalar_events(folder, "val/loss")),
        }

    def _prepared(self, settings: Settings, run: Run, tokenizer: Any, stage: str) -> PreparedData:
        name = run.settings["backbone"].get("name")
        key = json.dumps([settings, name, stage], sort_keys=True)
        if key not in self._data:
            self._data[key] = PreparedData(build_data(settings), tokenizer, stage)
        return self._data[key]


def save_weights(module: ComparedModule, file: Path) -> None:
    """Writes the trainable tensors, and the adapter's options, which the run may have chosen itself."""
    tensors = {n: p.detach().cpu().contiguous() for n, p in module.named_parameters() if p.requires_grad}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    save_file(tensors, part, {"adapter": json.dumps(method_of(module.adapter).options())})
    part.replace(file)


def weights_options(file: Path) -> dict[str, Any]:
    """The adapter's options that were written with the weights; none in files of older versions."""
    if not file.is_file():
        return {}
    with safe_open(file, "pt") as stored:
        options: dict[str, Any] = json.loads((stored.metadata() or {}).get("adapter", "{}"))
    return options


def load_weights(module: ComparedModule, file: Path) -> None:
    """Reads them back into a module that is built.

    Raises:
        ConfigError: If the file is missing.
        AdapterError: If it holds other tensors than the module's trainable ones.
    """
    if not file.is_file():
        raise ConfigError(f"{file} is missing: delete its folder, and the run is trained again")
    tensors = load_file(file)
    check_trainable_state(module, tensors)
    module.load_state_dict(tensors, strict=False)


def _finite(pairs: list[tuple[int, float]]) -> list[tuple[int, float | None]]:
    return [(step, _number(value)) for step, value in pairs]


def _number(value: float) -> float | None:
    """None for what JSON has no number for: a run that has diverged."""
    return value if math.isfinite(value) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's notes on the machine and on every trainer."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        try:
            yield
        finally:
            for logger, level in zip(loggers, before, strict=True):
                logger.setLevel(level)
