"""What a fit would refuse only after its model is loaded, refused before."""

import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from moka_pl._compat import cluster_environment
from moka_pl.adapters import FullFineTuning, MokaConfig, inject_adapter
from moka_pl.adapters.filters import AUTO
from moka_pl.data.types import HasEpochs, data_of
from moka_pl.errors import ConfigError, MokaWarning
from moka_pl.training.trainer_state import is_trial
from moka_pl.utils import existing_folder, space_shortage, warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Smallest whole numbers of options of which Lightning takes any, to fail in the middle of a run.
_LEAST = {
    "accumulate_grad_batches": 1,
    "check_val_every_n_epoch": 1,
    "gradient_clip_val": 0,
    "log_every_n_steps": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "num_nodes": 1,
    "num_sanity_val_steps": -1,
    "val_check_interval": 0,
}
#: Of these, values with which nothing would be trained or checked.
_NOTHING = {"max_epochs": 0, "max_steps": 0, "val_check_interval": 0, "limit_train_batches": 0}

_MOST_DEVICES = 128
#: How the strategies begin that spread a model otherwise than ours, by name or class.
_UNSUPPORTED = ("fsdp", "deepspeed", "modelparallel")
#: Optimizer steps of a whole run below which it is told that they are few.
_FEW_STEPS = 10


def check_options(options: Mapping[str, Any]) -> None:
    """Refuses what Lightning accepts among a trainer's options, and cannot use, or not with this package.

    Raises:
        ConfigError: Naming the option and its value.
    """
    for name, least in _LEAST.items():
        value = options.get(name)
        if isinstance(value, int | float) and not value >= least:  # NaN is neither
            raise ConfigError(f"trainer.{name} must be {least} or more, not {value}")
    for name, nothing in _NOTHING.items():
        if options.get(name) == nothing:
            raise ConfigError(f"trainer.{name} is {nothing}: nothing would be trained or validated; raise it")
    if options.get("barebones"):
        raise ConfigError("trainer.barebones is true: it forbids logs and checkpoints; leave it out")
    devices = str(options.get("devices"))
    if devices == "0":
        raise ConfigError("trainer.devices is 0; give at least one, or leave it out")
    if devices.isdigit() and int(devices) > _MOST_DEVICES:
        raise ConfigError(f"trainer.devices is {devices}; no machine has so many, and each is a process")
    name = strategy_parts(options.get("strategy"))[0]
    if name.replace("_", "").lower().startswith(_UNSUPPORTED):
        raise ConfigError(
            f"trainer.strategy {name} is not supported; choose ddp, or sharded or sharded_offload for a base "
            "larger than a GPU"
        )


def strategy_parts(strategy: Any) -> tuple[str, dict[str, Any]]:
    """Returns the name of a trainer's strategy, or of its class without modules, and its options.

    Args:
        strategy: A name or class path, or a class with options: a mapping, or the parser's namespace.
    """
    parts = _mapping(strategy)
    return str(parts.get("class_path", strategy)).rpartition(".")[2], dict(_mapping(parts.get("init_args")))


def _mapping(parsed: Any) -> Mapping[str, Any]:
    if isinstance(parsed, Mapping):
        return parsed
    return vars(parsed) if hasattr(parsed, "__dict__") else {}


def check_evaluation(trainer: Trainer, command: str) -> None:
    """Refuses an evaluation of no batches, which Lightning ends without a word.

    Args:
        trainer: The trainer of the evaluation.
        command: ``validate`` or ``test``.

    Raises:
        ConfigError: Naming the option.
    """
    name = evaluated_share(command)
    if getattr(trainer, name) == 0:
        raise ConfigError(f"trainer.{name} is 0: nothing would be evaluated; raise it, or leave it out")


def evaluated_share(command: str) -> str:
    """Returns the trainer's option that limits what ``validate`` or ``test`` evaluates."""
    return f"limit_{'val' if command == 'validate' else 'test'}_batches"


def check_accelerator(name: str) -> None:
    """Refuses a GPU where there is none.

    Raises:
        ConfigError: Naming the option, and what to do.
    """
    if name in ("gpu", "cuda") and not torch.accelerator.is_available():
        raise ConfigError(
            f"trainer.accelerator is {name}, but PyTorch {torch.__version__} finds no GPU; set cpu, "
            "or leave it out"
        )


def check_launcher(trainer: Trainer) -> None:
    """Refuses numbers of devices and machines other than those that a launcher has started processes for.

    Raises:
        ConfigError: Naming both numbers.
    """
    environment = cluster_environment(trainer)
    wanted = trainer.num_devices * trainer.num_nodes
    started = wanted
    if TorchElasticEnvironment.detect():
        started = TorchElasticEnvironment().world_size()  # for which a trainer with one device does not ask
    elif isinstance(environment, SLURMEnvironment):
        started = environment.world_size()
    if started != wanted:
        raise ConfigError(
            f"trainer.devices {trainer.num_devices} and trainer.num_nodes {trainer.num_nodes} make {wanted} "
            f"processes, but {started} were started; set them to the launcher's numbers"
        )
    alone = type(environment) is LightningEnvironment and "MASTER_ADDR" not in os.environ
    if trainer.num_nodes > 1 and alone:
        raise ConfigError(
            f"trainer.num_nodes is {trainer.num_nodes}, but no launcher has started this process: run the "
            "command on each machine by torchrun or srun"
        )


def check_trainer(trainer: Trainer) -> None:
    """Refuses a validation interval that no epoch reaches, and epochs without a batch; warns of few steps.

    Raises:
        ConfigError: Naming the option and the number of batches.
    """
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(data, HasEpochs) or data.streaming:
        return
    limit = trainer.limit_train_batches
    if isinstance(limit, float) and 0 < limit < 1 and data.epoch_length() == 0:
        raise ConfigError(
            f"trainer.limit_train_batches {limit:g} of an epoch is less than one batch; raise it"
        )
    _warn_of_few_steps(trainer, data)
    interval = getattr(trainer, "val_check_interval", None)  # Lightning sets none where it is a time
    if not isinstance(interval, int) or interval == 1 or trainer.check_val_every_n_epoch is None:
        return
    if trainer.limit_val_batches == 0:
        return
    batches = data.epoch_length()
    if interval > batches:
        raise ConfigError(
            f"trainer.val_check_interval is {interval}, but an epoch has {batches} batches. Set it to "
            f"{batches} at most, to a share such as 0.5, or set trainer.check_val_every_n_epoch to null to "
            "count the batches of all epochs"
        )


def _warn_of_few_steps(trainer: Trainer, data: HasEpochs) -> None:
    """Warns where the data make few steps, unless it was the number of steps or batches that was chosen."""
    chosen = trainer.max_steps != -1 or trainer.limit_train_batches != 1.0
    if chosen or is_trial(trainer) or (trainer.max_epochs or -1) < 0:
        return
    accumulated = trainer.accumulate_grad_batches
    steps = math.ceil(data.epoch_length() / accumulated)
    if (total := steps * (trainer.max_epochs or 0)) >= _FEW_STEPS:
        return
    remedies = [f"lower trainer.accumulate_grad_batches ({accumulated})"] if accumulated > 1 else []
    if data_of(trainer).packing:
        remedies.append("lower data.init_args.batch_size or max_tokens, which packing fills with examples")
    else:
        remedies.append("lower data.init_args.batch_size")
    warn(
        f"the data make only {steps} optimizer step{'s' * (steps > 1)} an epoch, {total} in the whole run, "
        f"which hardly train an adapter: {', '.join(remedies)}, or raise trainer.max_epochs"
    )


@dataclass(frozen=True)
class Kept:
    """What a callback keeps on a disk, with what is there while one takes another's place.

    Attributes:
        option: The option that sets the folder.
        folder: Where it is.
        adapters: Number of adapter directories.
        checkpoints: Number of checkpoints.
    """

    option: str
    folder: Path
    adapters: int = 0
    checkpoints: int = 0


@runtime_checkable
class Keeper(Protocol):
    """A callback that writes adapters or checkpoints."""

    def keeps(self) -> Kept | None:
        """Returns what it keeps; None if nothing is written to a disk of this machine."""


def trained_numbers(
    model: "PreTrainedModel", config: Any, saved: Mapping[str, Tensor] | None = None
) -> int | None:
    """Counts what an adapter trains; ``filters: auto`` counts as ``diverse``, its usual budget.

    Args:
        model: The base on the meta device, which is adapted afterwards.
        config: The adapter's configuration, of any method.
        saved: The tensors that it starts from, if any.

    Returns:
        The count; None of PEFT's methods, which may read weights as they are put in.
    """
    if not isinstance(config, MokaConfig | FullFineTuning):
        return None
    if isinstance(config, MokaConfig) and config.filters == AUTO:
        config = replace(config, filters="diverse", budget=None)
    with isolate_rng(include_cuda=False), torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", MokaWarning)  # the run's own adapters will say it
        inject_adapter(model, config, saved=saved)
    return sum(int(p.numel()) for p in model.parameters() if p.requires_grad)


def check_room(trainer: Trainer, parameters: int, state: float) -> None:
    """Refuses a run whose adapters and checkpoints do not fit on the disks that they are written to.

    Folders of one disk count together. Files that are there already are replaced, and count as room. A trial
    run writes none.

    Args:
        trainer: The trainer, whose callbacks have their folders.
        parameters: P, trained numbers: an adapter takes 4 P bytes, in float32.
        state: s, bytes of the optimizer for each: a checkpoint takes (4 + s) P.

    Raises:
        ConfigError: Naming a folder, what is needed and what is free.
    """
    if is_trial(trainer):
        return
    keepers = [c.keeps() for c in trainer.callbacks if isinstance(c, Keeper)]  # type: ignore[attr-defined]
    disks: dict[int, list[Kept]] = {}
    for kept in keepers:
        if kept is not None:
            disks.setdefault(existing_folder(kept.folder).stat().st_dev, []).append(kept)
    for together in disks.values():
        size = sum(
            parameters * (4 * kept.adapters + (4 + state) * kept.checkpoints) - _size_of(kept.folder)
            for kept in together
        )
        if (shortage := space_shortage(together[0].folder, round(size))) is not None:
            names = " and ".join(f"{kept.option} {kept.folder}" for kept in together)
            raise ConfigError(
                f"{names}: {shortage} for the adapters and checkpoints of {parameters:,} trained numbers; "
                "free some space, or choose folders on another disk"
            )


def _size_of(folder: Path) -> int:
    """Bytes of the files in a folder; those with several names, as checkpoints of one moment have, once."""
    found = (file.stat() for file in folder.rglob("*") if file.is_file())
    return sum({(one.st_dev, one.st_ino): one.st_size for one in found}.values())
