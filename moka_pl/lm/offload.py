"""Inputs of checkpointed layers in the memory of the host, copied while the GPU computes.

Checkpointing keeps the input of every layer, n · T · d numbers. Here each is copied to pinned memory while
the next layer computes, and comes back while the layer after it is computed again: a GPU holds two or three.
"""

import weakref
from collections import defaultdict
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: Numbers of a tensor that is worth a copy.
_FEWEST = 2**16


def offload_layer_inputs(model: "PreTrainedModel") -> None:
    """Has a model whose layers are checkpointed, without reentrance, keep their inputs in the host's memory.

    Within a layer checkpointing decides what is saved; what the decoder saves around its layers is their
    inputs. On a CPU, and in evaluation, nothing changes. Gradients are the same, bit for bit.

    Args:
        model: A causal language model with gradient checkpointing enabled.
    """
    decoder = model.get_decoder()
    store, entered = _Store(), list[Any]()

    def enter(module: nn.Module, args: Any) -> None:
        if module.training and torch.is_grad_enabled():
            hooks = saved_tensors_hooks(store.pack, store.unpack)
            hooks.__enter__()
            entered.append(hooks)

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        if entered:
            entered.pop().__exit__()

    decoder.register_forward_pre_hook(enter)
    decoder.register_forward_hook(leave, always_call=True)


class _Store:
    """Tensors in the order in which they were saved; each comes back before it is asked for.

    The host's memory is used again, as a CUDA graph in which these copies are recorded expects, and by
    batches of other sizes, too: each would pin memory of its own otherwise.
    """

    def __init__(self) -> None:
        self._last: weakref.ref[_Kept] | None = None
        self._free: defaultdict[tuple[int, torch.dtype], list[Tensor]] = defaultdict(list)

    def pack(self, tensor: Tensor) -> Any:
        """Begins to copy a tensor to the host; the one before it is there by now, and leaves the GPU."""
        if not _worth_a_copy(tensor):
            return tensor
        before = None if self._last is None else self._last()
        if before is not None:
            before.leave()
        kept = _Kept(tensor, self._last, self._free[_room_for(tensor), tensor.dtype])
        self._last = weakref.ref(kept)
        return kept

    def unpack(self, kept: Any) -> Tensor:
        """Returns a tensor on the GPU, and begins to fetch the one that was saved before it."""
        if isinstance(kept, Tensor):
            return kept
        tensor: Tensor = kept.take()
        before = None if kept.before is None else kept.before()
        if before is not None:
            before.fetch()
        return tensor


class _Kept:
    """A tensor on its way to the host and back.

    The GPU's memory is its stream's, which waits for each copy before it is given back.

    Args:
        tensor: The tensor, on a GPU.
        before: What was saved before it.
        free: Pinned vectors of its size that nobody uses; taken from there, and given back in the end.
    """

    def __init__(self, tensor: Tensor, before: "weakref.ref[_Kept] | None", free: list[Tensor]) -> None:
        self.before = before
        self._free, self._stream = free, _copy_stream(tensor.device)
        self._on_gpu: Tensor | None = tensor.detach()
        self._device = tensor.device
        size = _room_for(tensor)
        self._room = free.pop() if free else torch.empty(size, dtype=tensor.dtype, pin_memory=True)
        self._host = self._room[: tensor.numel()].view(tensor.shape)
        self._copied = self._copy(self._host, self._on_gpu)

    def __del__(self) -> None:
        if self._on_gpu is not None:  # nobody took it: its memory, too, may still be copied
            self.leave()
        self._free.append(self._room)  # whoever takes it copies on the same stream, later

    def _copy(self, to: Tensor, source: Tensor) -> Any:
        """Begins a copy once what is computed now is there; returns what tells of its end."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
        return self._stream.record_event()

    def leave(self) -> None:
        """Frees the GPU's memory."""
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        self._on_gpu = None

    def fetch(self) -> None:
        """Begins to copy the tensor back."""
        if self._on_gpu is None:
            self._on_gpu = torch.empty_like(self._host, device=self._device, pin_memory=False)
            self._copied = self._copy(self._on_gpu, self._host)

    def take(self) -> Tensor:
        """Returns the tensor, for the stream at hand."""
        self.fetch()
        tensor, self._on_gpu = self._on_gpu, None
        assert tensor is not None
        torch.cuda.current_stream(self._device).wait_event(self._copied)
        return tensor


@cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _room_for(tensor: Tensor) -> int:
    """Numbers of the pinned vector for a tensor: a power of two, to which torch rounds pinned memory up."""
    return 1 << (tensor.numel() - 1).bit_length()


def _worth_a_copy(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.is_floating_point() and tensor.numel() >= _FEWEST
