"""Fewer kernels a step, and nothing for which the CPU waits for the GPU."""

import gc
from collections.abc import Iterable
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.optim import SGD, Adam, AdamW, Optimizer

#: Optimizers of PyTorch that can update many parameters in one kernel on a GPU.
_FUSED = (Adam, AdamW, SGD)
#: Options that say how an optimizer computes, not what.
_HOW = ("fused", "foreach", "capturable")


def fuse_on_gpu(optimizer: Optimizer) -> Optimizer:
    """Returns the same optimizer with one kernel for many parameters, on a GPU, unless it was told otherwise.

    It also takes a flag on the GPU for a step that is to be skipped, so that the CPU need not wait for it. It
    is not for gradients that a scaler has multiplied, which it would divide itself.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    options = optimizer.defaults
    told = options.get("fused") is not None or any(options.get(name) for name in (*_HOW, "differentiable"))
    if type(optimizer) not in _FUSED or told or not all(p.is_cuda for p in parameters):
        return optimizer
    return rebuild_fused(optimizer)


def rebuild_fused(optimizer: Optimizer) -> Optimizer:
    """Returns a new optimizer with the groups and options of another one that has not been stepped."""
    kind: Any = type(optimizer)
    options = {
        name: value for name, value in optimizer.defaults.items() if name in signature(kind).parameters
    }
    groups = [{**group, "fused": True} for group in optimizer.param_groups]
    built: Optimizer = kind(groups, **options | {"fused": True})
    return built


def compute_as(checkpoint: dict[str, Any], optimizer: Optimizer) -> None:
    """Has a stored optimizer go on with this one's kernels, whatever it was computed with.

    Args:
        checkpoint: The loaded checkpoint.
        optimizer: This run's optimizer.
    """
    for stored in checkpoint["optimizer_states"][:1]:
        for group, fresh in zip(stored["param_groups"], optimizer.param_groups, strict=False):
            group |= {name: fresh[name] for name in _HOW if name in fresh}


def gradient_nodes(parameters: Iterable[nn.Parameter]) -> list[Any]:
    """Makes the nodes of autograd that add to the gradients of parameters, on the stream at hand.

    A node belongs to the stream that it is made on, and lives as long as something refers to it.
    ``DistributedDataParallel`` makes and keeps them, and Lightning wraps the model on a stream of its own:
    each gradient would then be waited for, and PyTorch warns of it. Nodes that are there already are kept.
    """
    return [get_gradient_edge(parameter).node for parameter in parameters if parameter.requires_grad]


class HostCopy:
    """A copy of a tensor in the host's memory.

    From a GPU it is copied once the GPU comes to it. To wait for that would leave the GPU without work until
    the host has launched the next kernels: ask for the values a step later.

    Args:
        tensor: The tensor, as it is now.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._copied: Any = None
        if tensor.device.type != "cuda":
            self._values = tensor.detach().to("cpu", copy=True)
            return
        self._values = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._values.copy_(tensor.detach(), non_blocking=True)
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._copied.record(torch.cuda.current_stream(tensor.device))

    @property
    def arrived(self) -> bool:
        """Whether the values can be read without waiting."""
        return self._copied is None or bool(self._copied.query())

    def read(self) -> Tensor:
        """Returns the values, for which it may have to wait."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._values


class AnyRank:
    """A question to all ranks, whose answer nobody waits for before it is asked for.

    Args:
        flag: This rank's answer.
        device: The device that the ranks communicate by.
    """

    def __init__(self, flag: bool, device: torch.device) -> None:
        yes = torch.full((1,), float(flag), device=device)
        torch.distributed.all_reduce(yes)  # of a GPU it is only launched
        self._yes = HostCopy(yes)

    def answer(self) -> bool:
        """Whether any rank's answer is yes."""
        return bool(self._yes.read()[0] > 0)


class KeptObjects(Callback):
    """Has Python's garbage collector pass by all objects that are there when training begins.

    They are some 800,000, of the libraries and the model; to look through them takes a fraction of a second,
    in which the GPU runs out of work. What training makes is collected as ever, and what nobody refers to any
    more is collected before: it would keep its memory, a GPU's too, until the end.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lays them aside."""
        gc.collect()
        gc.freeze()

    def on_train_end(self, trainer: Trainer, *of_end: Any) -> None:
        """Takes them back."""
        gc.unfreeze()

    def on_exception(self, trainer: Trainer, *of_exception: Any) -> None:
        """Takes them back."""
        gc.unfreeze()
