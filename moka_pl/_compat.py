"""The private names of other libraries that the package cannot do without, each behind a function of ours.

A private name may be gone with any release. So each is used here only, and says in which versions it was
seen, what it does, and what would be missing without it. A test of the same name finds private names
elsewhere and tries each of these against the installed libraries; continuous integration runs it with the
lowest and the newest versions that ``pyproject.toml`` allows.

Nothing is imported at the top: every function works on objects that it is given.
"""

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch import Tensor, nn
    from transformers import PreTrainedModel

# torch


def hook_count(module: "nn.Module") -> int:
    """Number of hooks, of any kind, that are registered with a module.

    Seen in torch 2.11 to 2.13; hooks are registered publicly, but there is no public way to ask for them.
    Without it a merged forward would pass a layer by and leave its hooks uncalled.
    """
    kinds = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return sum(len(hooks) for hooks in kinds)


def multiply_all_(tensors: "list[Tensor]", factor: "Tensor") -> None:
    """Multiplies tensors in place by one factor, in a few kernels for all of them.

    Seen in torch 2.11 to 2.13, whose own optimizers use it. Without it a loop over ``tensor.mul_(factor)``
    does the same, with a kernel for each tensor.
    """
    import torch

    torch._foreach_mul_(tensors, factor)


def multiplied(tensors: "list[Tensor]", factor: "Tensor") -> tuple["Tensor", ...]:
    """The products of tensors with one factor; see :func:`multiply_all_`."""
    import torch

    return tuple(torch._foreach_mul(tensors, factor))


def copy_all_(targets: "list[Tensor]", sources: "Sequence[Tensor]") -> None:
    """Copies tensors into others of the same shapes; see :func:`multiply_all_`."""
    import torch

    torch._foreach_copy_(targets, list(sources))


def saving_hooks() -> "tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None":
    """How tensors are packed and unpacked that autograd saves now, or None where they are kept as they are.

    Seen in torch 2.11 to 2.13; such hooks are set publicly with ``torch.autograd.graph.saved_tensors_hooks``,
    which checkpointing does, but only this tells them. Without it a layer could save its input only when its
    product is done, and checkpointing, which stops after the last saved tensor, would compute that again.
    """
    import torch

    hooks: tuple[Any, Any] | None = torch._C._autograd._top_saved_tensors_default_hooks(False)
    return hooks


def change_count(tensor: "Tensor") -> int:
    """How often a tensor has been changed in place.

    Seen in torch 2.11 to 2.13, which counts so itself. Without it a tensor that is changed between forward
    and backward pass would give a wrong gradient, and no error.
    """
    return tensor._version


def viewed(tensor: "Tensor") -> "Tensor":
    """The tensor that a tensor is a view of, or the tensor itself.

    Seen in torch 2.11 to 2.13. Without it two views of the same activations would be taken for two tensors,
    and be quantised twice.
    """
    return tensor if tensor._base is None else tensor._base


def leave_out_of_ddp(module: "nn.Module", names: Iterable[str]) -> None:
    """Has ``DistributedDataParallel`` neither broadcast nor reduce some parameters and buffers of a module.

    Seen in torch 2.11 to 2.13, in which DDP reads this attribute. Without it every rank would broadcast the
    frozen base when training begins, and 4-bit weights cannot be broadcast everywhere.
    """
    module._ddp_params_and_buffers_to_ignore = list(names)  # type: ignore[assignment]


def dump_checkpoint(trainer: "Trainer") -> dict[str, Any]:
    """Makes a checkpoint of a trainer's state, and writes nothing.

    Seen in Lightning 2.5 to 2.6. Without it a run could not be saved when one of its ranks has failed:
    ``save_checkpoint`` waits for all of them.
    """
    found: dict[str, Any] = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    return found


@contextmanager
def dumped_once(trainer: "Trainer") -> Iterator[None]:
    """Has all checkpoints that the calling thread makes in the body hold what the first of them holds.

    Seen in Lightning 2.5 to 2.6, whose ModelCheckpoint makes another one for each name of the same moment.
    Without it a step that saves would take twice as long.
    """
    connector, thread = trainer._checkpoint_connector, threading.get_ident()
    dump = connector.dump_checkpoint
    known: dict[Any, dict[str, Any]] = {}

    def dump_once(weights_only: bool | None = None) -> dict[str, Any]:
        if threading.get_ident() != thread:
            return dump(weights_only)
        if weights_only not in known:
            known[weights_only] = dump(weights_only)
        return known[weights_only]

    connector.dump_checkpoint = dump_once  # type: ignore[method-assign]
    try:
        yield
    finally:
        del connector.dump_checkpoint


def log_metrics(trainer: "Trainer", metrics: dict[str, Any], step: int) -> None:
    """Gives metrics to the loggers and to ``trainer.logged_metrics`` under a step's number.

    Seen in Lightning 2.5 to 2.6, whose modules can log under the number of the step at hand only. Without it
    metrics of an earlier step would be missing from ``trainer.logged_metrics``.

    Args:
        trainer: The trainer.
        metrics: Values by name.
        step: The number.
    """
    trainer._logger_connector.log_metrics(metrics, step)


@contextmanager
def without_sigterm_broadcast(trainer: "Trainer") -> Iterator[None]:
    """Has the ranks of a run not tell each other before every batch whether SIGTERM has come.

    Seen in Lightning 2.6, where each rank's CPU then waits for all GPUs to have finished the step before.
    Without it two GPUs would stand still between steps. Earlier versions ask no such thing.
    """
    loop, name = trainer.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"
    if not hasattr(loop, name):
        yield
        return
    setattr(loop, name, lambda: None)
    try:
        yield
    finally:
        delattr(loop, name)


def without_sigterm_notifier(trainer: "Trainer", instead: Callable[[int, Any], None]) -> None:
    """Has a rank that gets SIGTERM outside of training steps end, where Lightning asks the other ranks first.

    Seen in Lightning 2.6, whose handler sends the others a tensor. Without it a rank that gets the signal
    alone would wait for them in one collective, and they for it in another, for ever.

    Args:
        trainer: The trainer, before it installs signal handlers.
        instead: The handler that takes its place.
    """
    connector: Any = trainer._signal_connector
    connector._sigterm_notifier_fn = instead


def cluster_environment(trainer: "Trainer") -> Any:
    """What has started the processes of a run.

    Seen in Lightning 2.5 to 2.6. Without it a run on one device would not know that it is a job of SLURM:
    only the strategies of several devices tell.
    """
    return trainer._accelerator_connector.cluster_environment


def without_process_observer() -> None:
    """Has the thread of Lightning's that kills this process when one that it has started fails look at none.

    Seen in Lightning 2.5 to 2.6. Without it the first process would be killed before it has saved the run and
    told what has happened.
    """
    for thread in threading.enumerate():
        if hasattr(thread, "_child_processes"):
            thread._child_processes = []


def rendezvous_store() -> Any:
    """The key-value store by which the processes of a run have found each other.

    Seen in torch 2.11 to 2.13. Without it another connection to the first process would have to be made, and
    be waited for, when that process may be gone.
    """
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def skip_on_device(optimizer: "torch.optim.Optimizer", skip: "Tensor") -> bool:
    """Has an optimizer's next step do nothing if a flag on the GPU is set; False if it takes no such flag.

    Seen in torch 2.11 to 2.13, whose fused optimizers take it from ``GradScaler`` in the same way. Without it
    the CPU would have to wait for the GPU to know whether a step's gradient is finite.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    optimizer.found_inf, optimizer.grad_scale = skip.float(), None  # type: ignore[attr-defined]
    return True


# transformers


def mark_as_adapted(model: "PreTrainedModel", frozen: "Iterable[str] | None") -> None:
    """Tells trainers that a model has adapters: it may be quantised, and checkpoints lack frozen tensors.

    Seen in transformers 5.14 to 5.24, whose own integration of PEFT sets the first name. Without it their
    Trainer would refuse a quantised model, and warn of every frozen tensor when it goes on from a checkpoint.

    Args:
        model: The model.
        frozen: Names of the tensors that checkpoints lack; None where it has adapters no more.
    """
    model._hf_peft_config_loaded = frozen is not None
    model._keys_to_ignore_on_save = set(frozen or type(model)._keys_to_ignore_on_save or ())


def attention_implementation(model: "PreTrainedModel") -> str | None:
    """Name of the attention that a model computes with, such as ``sdpa``.

    Seen in transformers 5.14 to 5.24; it is set publicly with ``set_attn_implementation``, but only this
    tells it. Without it a model's own attention could not be put back after another one has been used.
    """
    name: str | None = getattr(model.config, "_attn_implementation", None)
    return name


def set_attention(model: "PreTrainedModel", name: str | None) -> str | None:
    """Sets the attention that a model's decoder computes with, such as ``sdpa``; returns what it was.

    Seen in transformers 5.14 to 5.24. ``set_attn_implementation`` is public, but looks through all modules,
    in every step a millisecond of the CPU's. Without it the CPU would wait for the GPU in every step instead.

    Args:
        model: The model.
        name: A registered attention.
    """
    config = model.get_decoder().config
    before: str | None = config._attn_implementation
    config._attn_implementation = name
    return before


def supports_flash_attention(model: "PreTrainedModel") -> bool:
    """Whether a model's class says that flash attention may take the place of its own.

    Seen in transformers 5.14 to 5.24. Without it packed rows would be computed with a mask, which is slower.
    """
    return bool(getattr(model, "_supports_flash_attn", False))


def unused_tensors(model: "PreTrainedModel", stored: Iterable[str]) -> list[str]:
    """Names of stored tensors that are no part of a model, but for those that its class expects to be left.

    Seen in transformers 5.14 to 5.24, which reports the same as unexpected. Without it what is left in files
    that are read here would not be told from layers that a damaged ``config.json`` leaves out.

    Args:
        model: The model.
        stored: Names of all tensors of its files.
    """
    expected = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq"]
    names = model.state_dict().keys()
    return [key for key in stored if key not in names and not any(re.search(p, key) for p in expected)]


def expert_gate(experts: "nn.Module") -> "Callable[[Tensor], Tensor] | None":
    """What a module of fused experts makes of the outputs of ``gate_up_proj``, from (N, 2 m) to (N, m).

    Seen in transformers 5.14 to 5.24, whose own implementations of experts call it; None for experts that
    these do not compute (LLaMA 4). Without it every kind of gate would have to be known here.
    """
    gate: Callable[[Tensor], Tensor] | None = getattr(experts, "_apply_gate", None)
    return gate


# datasets


def rows_fingerprint(rows: "Dataset") -> str:
    """A hash of what the rows are, which stays the same in another process.

    Seen in datasets 4.0 to 5.2; functions that change rows take a ``new_fingerprint``, but none tells it.
    Without it rows would be split and encoded anew each time they are asked for.
    """
    return str(rows._fingerprint)


# PEFT


def disable_adapters(layer: Any, disabled: bool) -> None:
    """Has a layer of PEFT's compute as its base layer, or as an adapted one again.

    Seen in PEFT 0.18 to 0.21, whose public ``enable_adapters`` also changes what requires gradients.
    Without it one would have to write down which parameters do, and restore that.
    """
    layer._disable_adapters = disabled


# Lightning


def trainer_of(module: "LightningModule") -> "Trainer | None":
    """The trainer that a module is attached to, if any.

    Seen in Lightning 2.6.0 to 2.6.6, whose public ``module.trainer`` raises an error where there is none.
    Without it one would have to catch that, and with it whatever else goes wrong in that property.
    """
    return module._trainer


def training_loader(trainer: "Trainer") -> Callable[[], Any] | None:
    """What makes a loader of the training's batches, apart from the one in use; None without training data.

    Seen in Lightning 2.6.0 to 2.6.6; ``trainer.train_dataloader`` is the loader in use, and not there before
    training. Without it filters could not be chosen from the first batches of a loader given to ``fit``.
    """
    source = trainer.fit_loop._data_source
    return source.dataloader if source.is_defined() else None


def save_last_checkpoint(callback: "ModelCheckpoint", trainer: "Trainer") -> None:
    """Writes ``last.ckpt`` now, and whatever else is due at this step later.

    Seen in Lightning 2.6.0 to 2.6.6, whose ModelCheckpoint writes it only together with another checkpoint.
    Without it ``--ckpt_path last`` would go back to the last regular checkpoint instead of to a run's end.
    """
    saved = callback._last_global_step_saved
    callback._save_last_checkpoint(trainer, callback._monitor_candidates(trainer))
    callback._last_global_step_saved = saved


def logger_version(logger: Any) -> int | str | None:
    """The version that a TensorBoardLogger or CSVLogger was given, or has chosen by now; None before.

    Seen in Lightning 2.6.0 to 2.6.6, whose public ``version`` chooses one when it is asked. Without it a
    version that the user gives could not be told from one that a run may choose.
    """
    version: int | str | None = logger._version
    return version


def set_logger_version(logger: Any, version: int) -> None:
    """Has a logger write to a version that is made already; see :func:`logger_version`.

    Without it two runs that begin at the same moment would choose the same one.
    """
    logger._version = version


# TensorBoard


def event_writer(experiment: Any) -> Any:
    """What writes a ``SummaryWriter``'s events, opened again if it was closed.

    Seen in torch 2.11 to 2.13; ``SummaryWriter`` itself writes one event for each scalar. Without it the
    gates of a large model would take many times as long to log.
    """
    return experiment._get_file_writer()
