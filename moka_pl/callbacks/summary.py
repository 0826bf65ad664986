"""The table at the end of a run."""

import sys
from pathlib import Path
from shlex import quote
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from moka_pl.backbone.quantization import weight_count
from moka_pl.callbacks.checkpoints import AdapterCheckpoint, validation_name
from moka_pl.callbacks.throughput import BatchStatistics, Throughput, peak_memory
from moka_pl.training.module import MokaModule
from moka_pl.training.trainer_state import is_trial

C = TypeVar("C", bound=Callback)


class RunSummary(Callback):
    """Prints a table after training: the frozen base against the adapted model, speed, memory and paths.

    The base's metrics come from the validation before the first step, when ΔW is exactly zero (with
    ``adapter_path`` they are that adapter's). They need ``trainer.num_sanity_val_steps: -1``, which validates
    on all of the data.
    """

    def __init__(self) -> None:
        self.before: dict[str, float] = {}
        self._validation: str | None = None
        self._trained = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes and logs the frozen base's metrics."""
        assert isinstance(pl_module, MokaModule)
        whole = trainer.num_sanity_val_steps == float("inf")
        # Lightning looks at the data before training in runs resumed at the end of an epoch, too.
        if trainer.sanity_checking and whole and trainer.global_step == 0:
            self.before = dict(pl_module.eval_values)
            for logger in trainer.loggers:
                logger.log_metrics(self.before, step=0)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Notes which data are validated on."""
        self._validation = validation_name(trainer) if stage == "fit" else None
        self._trained = False

    def state_dict(self) -> dict[str, Any]:
        """Returns the base's metrics: a resumed run does not evaluate it again."""
        return {"before": self.before, "validation": self._validation}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the base's metrics, if they are of the same validation data."""
        if state_dict.get("validation") in (None, self._validation):
            self.before = state_dict["before"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Notes that there is something to train, as there is not where a finished run is resumed."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prints the table, or that nothing was trained."""
        # On every rank: Lightning broadcasts it. Without a logger it would be the current folder.
        log_dir = trainer.log_dir if trainer.loggers else None
        if trainer.is_global_zero and not is_trial(trainer) and not trainer.interrupted:
            assert isinstance(pl_module, MokaModule)
            if trainer.ckpt_path is not None and not self._trained:
                print(
                    f"nothing was trained: the checkpoint is at step {trainer.global_step}, where "
                    f"the run ends (--trainer.max_epochs {trainer.max_epochs}, --trainer.max_steps "
                    f"{trainer.max_steps}); raise them to train on"
                )
                return
            print(summary_text(trainer, pl_module, self.before, log_dir))


def summary_text(
    trainer: Trainer, pl_module: MokaModule, before: dict[str, float], log_dir: str | None
) -> str:
    """Writes the closing table of a run.

    Args:
        trainer: The trainer, after fit.
        pl_module: The trained module.
        before: Metrics of the frozen base, may be empty.
        log_dir: The run's log folder, if it has one.
    """
    lines = _comparison(pl_module, before, trainer.global_step)
    facts = _facts(trainer, pl_module)
    checkpoint = _callback(trainer, AdapterCheckpoint)
    saved = {"best": checkpoint.best_path, "last": checkpoint.last_path} if checkpoint is not None else {}
    paths = {name: path for name, path in saved.items() if path is not None and path.exists()}
    facts |= {f"{name} adapter": str(path) for name, path in paths.items()}
    following = []
    if log_dir and any(isinstance(logger, TensorBoardLogger) for logger in trainer.loggers):
        facts["TensorBoard logs"] = log_dir
        following.append(f"  tensorboard --logdir {quote(str(Path(log_dir).parent))}")
    elif log_dir:
        facts["logs"] = log_dir
    if adapter := paths.get("best") or paths.get("last"):
        program = f"{Path(sys.executable).name} -m moka_pl"
        following.append(f"  {program} inspect {quote(str(adapter))}")
        following.append(f"  {program} {pl_module.next_command.format(adapter=quote(str(adapter)))}")
    lines += ["", *(f"{name:<22}{value}" for name, value in facts.items())]
    lines += ["", "Next:", *following] if following else []
    rule = "-" * 64
    return "\n".join(["", rule, *lines, rule])


def _comparison(pl_module: MokaModule, before: dict[str, float], steps: int) -> list[str]:
    """Returns the lines that compare the last validation's metrics with those of the base."""
    step = pl_module.eval_step
    # Training may have ended between two validations, or before the first.
    after = pl_module.eval_values if step else {}
    title = "after" if step == steps else f"step {step}"
    lines = [f"{'held-out':<28}{'before':>12}{title:>12}{'change':>12}"] if after else []
    for name in sorted(filter(_is_short, after), key=lambda n: (n.count("/"), "loss" not in n, n)):
        old, new = before.get(name), after[name]
        is_accuracy = "accuracy" in name or "acc_norm" in name
        if old is None:
            change = ""
        elif is_accuracy:
            change = f"{100 * (new - old):+.1f} pt"
        else:
            change = f"{100 * (new / old - 1):+.1f}%" if old else ""
        shown = ["" if v is None else f"{100 * v:.1f}%" if is_accuracy else f"{v:.4f}" for v in (old, new)]
        lines.append(f"{name.removeprefix('val/'):<28}{shown[0]:>12}{shown[1]:>12}{change:>12}")
    if before and step != steps:
        lines.append(f"no validation after the last of {steps} steps; see --trainer.val_check_interval")
    return lines


def _facts(trainer: Trainer, pl_module: MokaModule) -> dict[str, str]:
    """Returns size, speed, padding and memory by name."""
    trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
    share = trainable / (trainable + base_size(pl_module))
    facts = {"trainable parameters": f"{trainable:,} ({100 * share:.2f}% of all parameters)"}
    speed, batches = _callback(trainer, Throughput), _callback(trainer, BatchStatistics)
    if speed is not None and speed.total_tokens:
        rate = speed.tokens_per_second * trainer.world_size
        facts["training speed"] = f"{rate:,.0f} {speed.unit}/s over {trainer.world_size} process(es)"
    if batches is not None and batches.padded_tokens:
        facts["padding"] = f"{100 * batches.padding_share:.1f}% of training batch tokens"
    # Lightning has moved the module off its GPU by now.
    device = trainer.strategy.root_device
    return facts | {"peak memory": f"{peak_memory(device):.2f} GiB ({device})"}


def _callback(trainer: Trainer, kind: type[C]) -> C | None:
    """Returns the trainer's first callback of a class."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)


def _is_short(name: str) -> bool:
    """Whether a metric belongs in a short table: overall metrics, losses of sets, accuracies of tasks."""
    _, *parts = name.split("/")
    chosen = len(parts) == 1 or parts[-1] == "loss" or parts[0] == "accuracy"
    return chosen and not name.endswith("_stderr")


def base_size(pl_module: MokaModule) -> int:
    """Returns the number of frozen weights, unpacking quantised ones."""
    return sum(weight_count(p) for p in pl_module.parameters() if not p.requires_grad)
