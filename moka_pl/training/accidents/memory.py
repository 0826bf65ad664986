"""Steps that the memory does not hold: what ran out, and what to lower."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.memory import garbage_collection_cuda

from moka_pl.adapters import method_of
from moka_pl.data.types import Batch, data_of
from moka_pl.errors import ConfigError, one_line
from moka_pl.evaluation.memory import OutOfMemoryError, is_out_of_memory
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.training.sharding.strategy import ShardedStrategy

if TYPE_CHECKING:
    from moka_pl.training.module import MokaModule
    from moka_pl.training.steps import TrainedModule


class StepMemoryError(OutOfMemoryError):
    """A training step does not fit into the memory.

    Args:
        message: What ran out, and the remedies.
        usable: Whether the weights are those of the last step: an optimizer may have changed some of them.
    """

    def __init__(self, message: str, usable: bool = True) -> None:
        super().__init__(message)
        self.usable = usable


@contextmanager
def memory_errors(module: "TrainedModule", where: str, batch: Batch | None) -> Iterator[None]:
    """Has the body's lack of memory end the run with one line.

    Args:
        module: The module that is trained.
        where: The part of a step that the body is.
        batch: The micro-batch at hand.

    Raises:
        StepMemoryError: If the memory does not suffice.
    """
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        release(error)
        reason = one_line(error)
    raise step_error(module, where, batch, reason)


def step_error(module: "TrainedModule", where: str, batch: Batch | None, reason: str) -> StepMemoryError:
    """Makes the error of a step that does not fit.

    Args:
        module: The module that is trained.
        where: The part of the step.
        batch: The micro-batch, or the part of it, that was computed.
        reason: What the memory's allocator says.
    """
    images = batch is not None and "input_ids" not in batch
    rows, size, estimate = 0, "", ""
    if batch is not None and images:
        rows = len(batch["labels"])
        size = f", with a micro-batch of {rows} images"
    elif batch is not None:
        rows, tokens = batch["input_ids"].shape
        size = f", with a micro-batch of {rows} x {tokens:,} tokens"
        # The lack of memory says more than what else goes wrong.
        with suppress(Exception):
            if module.describe_memory is not None:
                trained = int((batch["labels"].cpu()[:, 1:] != IGNORE_INDEX).sum())
                estimate = module.describe_memory(rows, tokens, trained) + ". "
    usable = not module.updating
    kept = "" if usable else "The optimizer had begun to change the weights, which are not saved. "
    remedy = _sentence(remedies(module, rows, images))  # type: ignore[arg-type]
    step = f"step {module.trainer.global_step + 1}{size}"
    message = f"out of memory in {where} of {step}. {estimate}{kept}{remedy}. ({reason})"
    return StepMemoryError(message, usable)


def release(error: BaseException | None) -> None:
    """Frees what the frames of an error hold: a whole pass, while the run is saved."""
    seen = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
    garbage_collection_cuda()


def remedies(module: "MokaModule", rows: int, images: bool = False) -> list[str]:
    """Returns what takes less memory and is not in use yet, the cheapest first.

    Args:
        module: The module that is trained.
        rows: Rows of the micro-batch; 0 where they are unknown.
        images: Whether they are images, which have no length, and which no option halves.
    """
    trainer, strategy = module.trainer, module.trainer.strategy
    on_gpu, compiled = module.device.type == "cuda", module.backbone.compile == "layers"
    sharded = isinstance(strategy, ShardedStrategy)
    found = []
    if rows != 1:
        found.append("lower data.init_args.batch_size (and raise trainer.accumulate_grad_batches as much)")
        if not images and not module.halves_batches and halving_unsupported_reason(module) is None:
            found.append("set model.halve_micro_batches: true")
    packs = data_of(trainer).packing
    if not images:
        found.append(f"lower data.init_args.max_length{' (the tokens of a packed row)' if packs else ''}")
    if module.cuda_graphs and on_gpu:
        found.append("set model.cuda_graphs: false")
    if not module.gradient_checkpointing:
        found.append("set model.gradient_checkpointing: true")
    elif module.gradient_checkpointing != "offload" and on_gpu and not compiled:
        found.append("set model.gradient_checkpointing: offload")
    if method_of(module.adapter).keeps_base and not compiled:
        if not sharded and trainer.world_size > 1:
            found.append("choose --trainer.strategy sharded")
        elif on_gpu and not (isinstance(strategy, ShardedStrategy) and strategy.offload):
            found.append("choose --trainer.strategy sharded_offload")
    return found


def halving_unsupported_reason(module: "TrainedModule") -> str | None:
    """Returns why micro-batches cannot be computed in parts in this run, or None."""
    trainer, strategy = module.trainer, module.trainer.strategy
    if module.cuda_graphs:
        return "model.cuda_graphs is true, but recorded steps keep their sizes; set it to false"
    if trainer.world_size == 1:
        return None
    if getattr(trainer.precision_plugin, "scaler", None) is not None:
        return "--trainer.precision 16-mixed looks for overflows before ranks add up; use bf16-mixed"
    if not isinstance(strategy, DDPStrategy):
        return f"it is not known how {type(strategy).__name__} averages gradients; use --trainer.strategy ddp"
    return None


def check_halving(module: "TrainedModule") -> None:
    """Refuses a run whose micro-batches cannot be computed in parts.

    Raises:
        ConfigError: Naming the reason.
    """
    if module.halves_batches and (reason := halving_unsupported_reason(module)) is not None:
        raise ConfigError(f"model.halve_micro_batches is true, but {reason}")


def _sentence(parts: list[str]) -> str:
    text = ", or ".join(parts)
    return text[:1].upper() + text[1:]
