"""Launching a Triton kernel again without Triton's look at every argument.

That look takes tens of microseconds, more than a small kernel runs. Within a plan everything it would find is
the same at every launch but for the alignment of tensors that come from outside.
"""

from typing import Any

import torch
from torch import Tensor

#: Bytes that Triton's wide loads need a tensor to be aligned to.
_ALIGNMENT = 16


def launch(
    kernel: Any,
    compiled: dict[Any, Any],
    key: tuple[Any, ...],
    grid: tuple[int, int, int],
    outside: tuple[Tensor, ...],
    args: tuple[Any, ...],
    **options: Any,
) -> None:
    """Launches ``kernel[grid](*args)``.

    Args:
        kernel: A function under ``triton.jit``.
        compiled: Kernels compiled for one plan, by key.
        key: Everything that may differ between launches for one plan: the kernel, dtypes, constants.
        grid: Numbers of programs.
        outside: Tensors among the arguments that somebody else has made.
        args: All arguments in order, constants too.
        **options: Triton's compile options.
    """
    device = outside[0].device
    if device.type != "cuda":  # the interpreter
        kernel[grid](*args)
        return
    if device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            launch(kernel, compiled, key, grid, outside, args, **options)
        return
    aligned = all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in outside)
    ready = compiled.get(key) if aligned else None
    if ready is not None:
        ready[grid](*args)
        return
    fresh = kernel[grid](*args, **options)
    if aligned:
        compiled[key] = fresh
