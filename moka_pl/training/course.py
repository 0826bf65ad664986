"""What decides the course of a training run, as checkpoints record it, and what a resumed run may change.

Recorded are values in effect rather than options: rows by their content, an optimizer by what it was built
with. So a file may move and an option may be spelled in another way, but no change goes unnoticed.
"""

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch.optim import Optimizer

from moka_pl.adapters.config import applied_scaling
from moka_pl.backbone import compute_dtype
from moka_pl.data.batching.order import change_of, describe, differences
from moka_pl.data.types import data_of
from moka_pl.errors import ConfigError

if TYPE_CHECKING:
    from moka_pl.training.module import MokaModule

Change = Literal[
    "data",
    "batch_size",
    "seed",
    "ranks",
    "accumulation",
    "optimizer",
    "learning_rate",
    "scheduler",
    "adapter",
    "precision",
    "quantization",
    "clipping",
]

_ANEW = "the epoch begins anew"
_FROM_HERE = "takes effect from here on"

#: What happens to a run that resumes with a change that is allowed.
CONSEQUENCES: dict[str, str] = {
    "data": _ANEW,
    "batch_size": _ANEW,
    "seed": _ANEW,
    "ranks": _ANEW,
    "accumulation": _FROM_HERE,
    "optimizer": "new options take effect from here on; another class starts with an empty state",
    "learning_rate": "takes effect from here on, at this point of the schedule",
    "scheduler": "goes on as if it had been used from the first step",
    "adapter": _FROM_HERE,
    "precision": _FROM_HERE,
    "quantization": _FROM_HERE,
    "clipping": _FROM_HERE,
}

#: Changes with which the batches served so far say nothing about those to come.
OTHER_BATCHES = {name for name, then in CONSEQUENCES.items() if then == _ANEW}

Course = dict[str, dict[str, Any]]
"""Plain values by change and option."""

Changed = dict[str, dict[str, tuple[Any, Any]]]
"""Values (stored, current) by change and option."""

# Computed in another way, with the same result.
_OPTIMIZER_SPEED = {"foreach", "fused", "capturable", "differentiable"}
# Where a scheduler stands, and rates that are the optimizer's.
_SCHEDULER_STATE = {
    "base_lrs",
    "last_epoch",
    "lr_lambdas",
    "verbose",
    "_get_lr_called_within_step",
    "_is_initial",
    "_last_lr",
    "_step_count",
}


def check_allowed(names: Collection[str]) -> None:
    """Refuses names that are no changes."""
    for name in names:
        if name not in CONSEQUENCES:
            raise ConfigError(f"allow_changes: unknown name {name!r}; choose from {', '.join(CONSEQUENCES)}")


def course_of(module: "MokaModule", trainer: Trainer) -> Course:
    """Describes a run but for its optimizer; its rows only once they are loaded."""
    course: Course = {name: {} for name in CONSEQUENCES}
    for option, value in data_of(trainer).batch_order.items():
        course[change_of(option)][option] = value
    course["data"] |= {
        "limit_train_batches": trainer.limit_train_batches,
        "overfit_batches": trainer.overfit_batches,  # type: ignore[attr-defined]
    }
    course["ranks"] = {"ranks": trainer.world_size}
    callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
    scheduling = [c.scheduling for c in callbacks if isinstance(c, GradientAccumulationScheduler)]
    accumulation = str(scheduling[0]) if scheduling else trainer.accumulate_grad_batches
    course["accumulation"] = {"accumulate_grad_batches": accumulation}
    algorithm = getattr(trainer.gradient_clip_algorithm, "value", trainer.gradient_clip_algorithm)
    clips = trainer.gradient_clip_val is not None
    course["clipping"] = {
        "gradient_clip_val": trainer.gradient_clip_val,
        "gradient_clip_algorithm": (algorithm or "norm") if clips else None,
    }
    dtype = compute_dtype(module.backbone, trainer.strategy.root_device)
    course["precision"] = {
        "precision": str(trainer.precision),
        "compute_dtype": str(dtype).removeprefix("torch."),
        "matmul": module.backbone.matmul,
    }
    course["quantization"] = quantization_of(module.backbone.options())
    return course


def optimizer_course(optimizer: Optimizer, scheduler: Any) -> Course:
    """Describes a new optimizer and its scheduler, which has not been stepped."""
    options = _optimizer_options(optimizer)
    rate = {"lr": options.pop("lr", None)}
    return {
        "optimizer": options,
        "learning_rate": rate,
        "scheduler": _scheduler_options(scheduler, optimizer),
    }


def main_settings(course: Course) -> dict[str, Any]:
    """Returns the settings of a run that a reader of its results asks for first."""
    told = {
        "training examples": course["data"].get("rows"),
        "batch size": course["batch_size"].get("batch_size"),
        "devices": course["ranks"].get("ranks"),
        "accumulated batches": course["accumulation"].get("accumulate_grad_batches"),
        "optimizer": course["optimizer"].get("class"),
        "learning rate": course["learning_rate"].get("lr"),
        "schedule": course["scheduler"].get("class"),
        "seed": course["seed"].get("seed"),
        "precision": course["precision"].get("precision"),
    }
    if (matmul := course["precision"].get("matmul", "bf16")) != "bf16":
        told["frozen products"] = matmul
    return {name: value for name, value in told.items() if value is not None}


def quantization_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns how the base is quantised, from its options."""
    kind = options.get("quantization")
    return {
        "quantization": kind,
        "double_quantization": options.get("double_quantization") if kind != "none" else None,
    }


def adapter_course(options: Mapping[str, Any], training: bool) -> dict[str, Any]:
    """Returns the adapter options that another value would give another meaning to the same tensors.

    Filters, gates and other methods' options are left out: they make a checkpoint unfit, however allowed.

    Args:
        options: All options, as the method stores them.
        training: Whether those count that only training knows.
    """
    course = {name: value for name, value in options.items() if training and "dropout" in name}
    if "components" in options:
        course["scaling"] = applied_scaling(
            options.get("scaling"), options.get("filters"), options["components"]
        )
    return course


def changed_course(stored: Mapping[str, Mapping[str, Any]], current: Course) -> Changed:
    """Returns what differs, by change; of another class of optimizer or scheduler the class alone."""
    changed: Changed = {}
    for name, options in current.items():
        found = differences(stored.get(name, {}), options)
        if "class" in found:
            found = {"class": found["class"]}
        if found:
            changed[name] = found
    return changed


def only_held_out(changed: Changed) -> bool:
    """Whether the same data are trained on but for the rows that are held out: validation data may change."""
    return changed.get("data", {}).keys() <= {"rows", "data"}


def check_changes(changed: Changed, allowed: Collection[str]) -> None:
    """Refuses changes that are not allowed.

    Raises:
        ConfigError: Naming every change with both values.
    """
    refused = {name: found for name, found in changed.items() if name not in allowed}
    if refused:
        named = "; ".join(f"{name}: {describe(found)}" for name, found in refused.items())
        then = "; ".join(f"{name}: {CONSEQUENCES[name]}" for name in refused)
        raise ConfigError(
            f"the checkpoint is of a run with other options ({named}). Resume with the options and data of "
            f"that run, or allow the changes with --model.allow_changes '[{', '.join(changed)}]' ({then})"
        )


def _optimizer_options(optimizer: Optimizer) -> dict[str, Any]:
    options = {k: _plain(v) for k, v in optimizer.defaults.items() if k not in _OPTIMIZER_SPEED}
    return {"class": _class_name(optimizer)} | options


def _scheduler_options(scheduler: Any, optimizer: Optimizer) -> dict[str, Any]:
    options: dict[str, Any] = {"class": _class_name(scheduler)} | _plain(scheduler.state_dict())
    # Some keep their options in the optimizer: highest and lowest rates.
    known = {*optimizer.defaults, "params", "name", "initial_lr"}
    added = {k: _plain(v) for k, v in optimizer.param_groups[0].items() if k not in known}
    return options | added


def _class_name(built: object) -> str:
    """Returns package and class, without the modules between, which move."""
    return f"{type(built).__module__.partition('.')[0]}.{type(built).__qualname__}"


def _plain(value: Any) -> Any:
    """Returns numbers, texts and collections of them, as a checkpoint can hold them; other things as None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items() if k not in _SCHEDULER_STATE}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if hasattr(value, "item") and getattr(value, "numel", lambda: 1)() == 1:
        value = value.item()  # rates may be tensors
    return value if isinstance(value, bool | int | float | str) else None
