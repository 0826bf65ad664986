"""Trains and tests single runs in this process, with one base and one set of tokenised data.

What is kept of a training, its losses, gates and ranks, is small enough for a report.
"""

import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from moka_pl.adapters import moka_layers, save_adapter
from moka_pl.backbone.quantization import base_bytes
from moka_pl.callbacks import GateMonitor
from moka_pl.callbacks.evaluation import results_dict
from moka_pl.callbacks.gates import gate_matrix
from moka_pl.callbacks.throughput import log_interval
from moka_pl.data import MokaDataModule
from moka_pl.data.types import DataDefaults
from moka_pl.errors import ConfigError
from moka_pl.ops.gating import normalised_entropy
from moka_pl.studies.common import (
    device_name,
    first_line,
    free_memory,
    peak_gib,
    reset_peak,
    silenced_lightning,
    versions,
)
from moka_pl.studies.compare.build import backbone_of, build_data, build_module, build_trainer
from moka_pl.studies.compare.runs import (
    ItemColumns,
    Outcome,
    Run,
    Store,
    tested_with,
    text_columns,
    untrained_run,
    warn,
)
from moka_pl.studies.compare.shared_base import ComparedModule, SharedBase
from moka_pl.studies.compare.suite import Settings, Suite, merged
from moka_pl.studies.spectra import spectra_summary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


#: Folder of the trained adapter in the run's folder.
ADAPTER = "adapter"


class PreparedData(DataDefaults, LightningDataModule):
    """Loaders of a data module that is set up already, in an order that a seed decides.

    Args:
        data: The data module.
        tokenizer: The base model's.
        stage: ``fit`` for training and validation data, ``test`` for test data.
    """

    def __init__(self, data: MokaDataModule, tokenizer: "PreTrainedTokenizerBase", stage: str) -> None:
        super().__init__()
        data.connect(tokenizer)
        data.setup(stage)
        self.data = data
        self.packing = data.packing

    @property
    def eval_sets(self) -> Sequence[tuple[str, Sequence[str]]]:
        """Those of the data."""
        return self.data.eval_sets

    @property
    def task_groups(self) -> Mapping[str, Sequence[str]]:
        """Those of the data."""
        return self.data.task_groups

    def order(self, seed: int) -> "PreparedData":
        """Sets the seed of the training order."""
        self.data.seed = seed
        return self

    def train_dataloader(self) -> Any:
        """Shuffled batches; a new loader, which knows of no earlier run."""
        return self.data.train_dataloader()

    def val_dataloader(self) -> Any:
        """Every validation example once."""
        return self.data.val_dataloader()

    def test_dataloader(self) -> Any:
        """Every test example once."""
        return self.data.test_dataloader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lets the module see a batch while it is on the CPU."""
        self.data.trainer = self.trainer
        return self.data.on_before_batch_transfer(batch, dataloader_idx)


def prepare_data(suites: Sequence[Suite]) -> None:
    """Reads and tokenises the data of all suites, so that every process finds them in the cache.

    Args:
        suites: The suites; data that they have in common are prepared once.

    Raises:
        MokaError: If data or tokenizers cannot be had.
    """
    from moka_pl.backbone import load_tokenizer

    seen = set()
    for suite in suites:
        backbones = [merged(suite.backbone, method.backbone) for method in suite.methods] or [suite.backbone]
        for backbone in backbones:
            for settings, stage in ((suite.data, "fit"), (suite.test or suite.data, "test")):
                key = json.dumps(
                    [settings, stage, backbone.get("name"), backbone.get("revision")], sort_keys=True
                )
                if key not in seen:
                    seen.add(key)
                    tokenizer = load_tokenizer(backbone_of(backbone))
                    PreparedData(build_data(settings), tokenizer, stage)


class RunRecorder(Callback):
    """Notes the training loss and the gates at every logged step, and the training's memory.

    Attributes:
        losses: (step, loss in nats per token), on the training's device until they are asked for.
        peak: Largest GPU memory of the training steps in GiB; None without a GPU.
        step_ms: Mean time of the optimizer steps before the first evaluation.
    """

    def __init__(self) -> None:
        self.losses: list[tuple[int, Tensor]] = []
        self.peak: float | None = None
        self.step_ms: float | None = None
        self._begun = 0.0
        self._gates: list[tuple[int, Tensor]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the gates as they are before the first step."""
        self.losses, self._gates, self.peak, self.step_ms = [], [], None, None
        if pl_module.device.type == "cuda":
            reset_peak(pl_module.device)
        self._note_gates(trainer, pl_module)
        self._begun = time.monotonic()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes memory and time before evaluations add theirs."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._note_cost(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Notes loss and gates."""
        step = trainer.global_step
        if step % log_interval(trainer) or (self.losses and self.losses[-1][0] == step):
            return
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None:
            self.losses.append((step, loss.detach().clone()))
        self._note_gates(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes the last gates, and memory and time if nothing was evaluated."""
        self._note_cost(trainer, pl_module)
        if self._gates and self._gates[-1][0] != trainer.global_step:
            self._note_gates(trainer, pl_module)

    def loss_values(self) -> list[tuple[int, float]]:
        """The losses as numbers."""
        return [(step, float(loss)) for step, loss in self.losses]

    def gates(self, model: torch.nn.Module) -> dict[str, Any] | None:
        """The gates over the steps.

        Args:
            model: The trained model, whose layers know the shapes of their components.

        Returns:
            ``steps``; ``entropy``, the mean normalised entropy of all layers at each; ``shapes``, the mean
            gate of every kind of layer and shape of component at each, as shares of the uniform gate 1/r;
            ``final_entropy`` of every layer. None without trained gates.
        """
        if not self._gates:
            return None
        history = torch.stack([gates for _, gates in self._gates])  # (steps, layers, r)
        columns: dict[str, list[Tensor]] = {}
        for index, (name, layer) in enumerate(moka_layers(model).items()):
            for i, label in enumerate(layer.shapes):
                columns.setdefault(f"{name.rpartition('.')[2]} {label}", []).append(history[:, index, i])
        entropy = normalised_entropy(history)  # (steps, layers)
        r = history.shape[2]
        return {
            "steps": [step for step, _ in self._gates],
            "entropy": _rounded(entropy.mean(1)),
            "shapes": {name: _rounded(torch.stack(gates).mean(0) * r) for name, gates in columns.items()},
            "final_entropy": _rounded(entropy[-1]),
        }

    def _note_cost(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.step_ms is None and trainer.global_step:
            self.step_ms = round(1000 * (time.monotonic() - self._begun) / trainer.global_step, 2)
            self.peak = peak_gib(pl_module.device) if pl_module.device.type == "cuda" else None

    def _note_gates(self, trainer: Trainer, pl_module: LightningModule) -> None:
        gates = gate_matrix(pl_module)
        if gates is not None:
            self._gates.append((trainer.global_step, gates))


class Executor:
    """Does runs one after another and writes down what became of them.

    Args:
        store: Where outcomes go.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self.base = SharedBase()
        self._data: dict[str, PreparedData] = {}
        self._before: dict[str, ItemColumns] = {}

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
            with silenced_lightning():
                self._execute(run, test, outcome)
        except Exception as error:
            outcome["error"] = first_line(error)
            self.store.write(run, outcome)
        finally:
            self.base.restore()
            free_memory()  # of the trainer, which others that use the same GPU may need
        return outcome

    def _execute(self, run: Run, test: bool, outcome: Outcome) -> None:
        folder = self.store.path(run)
        if run.rate is not None and not (folder / ADAPTER).is_dir():
            # Its adapter was left behind somewhere: what is to be tested is lost.
            outcome.pop("trained", None)
        trained = "trained" in outcome
        module = build_module(run, folder / ADAPTER if trained and run.rate is not None else None)
        module.shared = self.base
        if not trained:
            shutil.rmtree(folder, ignore_errors=True)  # curves of an attempt that did not end
        recorder = RunRecorder()
        gated = run.rate is not None and "class_path" not in run.settings["adapter"]
        monitors = [recorder, GateMonitor(heatmap=False)] if gated else [recorder]
        trainer = build_trainer(run, folder, monitors)
        module.base_device = trainer.strategy.root_device
        # First of all, so that no random number is drawn between the seed and the adapters' start.
        tokenizer = self.base.get(module.backbone, trainer.strategy.root_device).tokenizer
        if not trained:
            outcome["trained"] = self._train(run, module, trainer, recorder, tokenizer)
            self.store.write(run, outcome)
        elif test:
            module.configure_model()
        if test and not tested_with(outcome, run):
            start = time.monotonic()
            items, scores = self._test(run, module, trainer, tokenizer)
            keys = {"key": run.test_key} | ({} if run.text_key is None else {"text": run.text_key})
            outcome["tested"] = keys | {"seconds": time.monotonic() - start, **scores}
            self.store.write(run, outcome, items)

    def _test(
        self, run: Run, module: ComparedModule, trainer: Trainer, tokenizer: Any
    ) -> tuple[ItemColumns, dict[str, Any]]:
        """What the test's items scored, with the plain text's windows where that is asked for; the scores."""
        answers = run.beside.get("generate", {})
        module.max_new_tokens, module.answer_tasks = (
            answers.get("max_new_tokens", 0),
            answers.get("tasks", []),
        )
        trainer.test(module, datamodule=self._prepared(run.test, run, tokenizer, "test"), verbose=False)
        assert module.eval_results is not None
        assert module.items is not None
        items, scores = module.items, results_dict(module.eval_results)
        if "forgetting" in run.beside:
            text = self._prepared(run.beside["forgetting"], run, tokenizer, "test")
            module.max_new_tokens = 0
            after = _windows(module, trainer, text)
            key = json.dumps([run.settings["backbone"], run.beside["forgetting"]], sort_keys=True)
            if run.rate is None:
                self._before[key] = after
            elif key not in self._before:
                self.base.restore()
                untrained = build_module(untrained_run(run))
                untrained.shared, untrained.base_device = self.base, module.base_device
                self._before[key] = _windows(untrained, trainer, text)
            items |= text_columns(self._before[key], after)
        return items, scores

    def _train(
        self, run: Run, module: ComparedModule, trainer: Trainer, recorder: RunRecorder, tokenizer: Any
    ) -> dict[str, Any]:
        device = device_name(trainer.strategy.root_device.type)
        about = {"device": device, "versions": versions(), "date": time.strftime("%Y-%m-%d")}
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
            raise ConfigError(
                "no validation data to pick the learning rate; set validation_share or a validation_path"
            )
        assert module.base is not None
        folder = self.store.path(run)
        save_adapter(folder / ADAPTER, module.causal_lm, module.adapter, module.base)
        return about | {
            "parameters": sum(p.numel() for p in module.parameters() if p.requires_grad),
            "base_mib": round(base_bytes(module.causal_lm) / 2**20, 2),
            "steps": steps,
            "batches": module.batches,
            "validation_loss": _number(values["val/loss"]),
            "validation_acc_norm": values.get("val/acc_norm"),
            "losses": [(step, _number(loss)) for step, loss in recorder.loss_values()],
            "gates": recorder.gates(module.causal_lm),
            "spectra": _spectra(module) if run.spectra else None,
            "lora_rank": _lora_rank(module),
            "peak_gib": recorder.peak,
            "step_ms": recorder.step_ms,
            "seconds": time.monotonic() - start,
        }

    def _prepared(self, settings: Settings, run: Run, tokenizer: Any, stage: str) -> PreparedData:
        base = [run.settings["backbone"].get(option) for option in ("name", "revision")]
        key = json.dumps([settings, base, stage], sort_keys=True)
        if key not in self._data:
            self._data[key] = PreparedData(build_data(settings), tokenizer, stage)
        return self._data[key]


def _lora_rank(module: ComparedModule) -> int | None:
    """Rank of the LoRA that the largest update is exactly; None where that is not known."""
    config: Any = module.adapter
    if type(config).__name__ == "LoraConfig" and not config.use_dora:
        return int(config.r)
    return max((layer.exact_lora_rank() for layer in moka_layers(module.causal_lm).values()), default=None)


def _windows(module: ComparedModule, trainer: Trainer, text: PreparedData) -> ItemColumns:
    """What the windows of a plain text score."""
    trainer.test(module, datamodule=text, verbose=False)
    assert module.items is not None
    return module.items


def _spectra(module: ComparedModule) -> dict[str, Any] | None:
    try:
        return spectra_summary(module.causal_lm)
    # A training is worth more than what is told about it; some methods have no update to look at.
    except Exception as error:
        warn(f"no spectra: {first_line(error)}")
        return None


def _number(value: float) -> float | None:
    """None for what JSON has no number for: a run that has diverged."""
    return value if math.isfinite(value) else None


def _rounded(values: Tensor) -> list[float | None]:
    """None for what JSON has no number for: gates of a run that has diverged."""
    return [round(value, 5) if math.isfinite(value) else None for value in values.tolist()]
