"""Which tensors hold a NaN or an infinity."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def non_finite_names(values: Any) -> list[str]:
    """Returns the names of the floating-point tensors that hold a NaN or an infinity, in their order.

    ``values`` is a tensor, or mappings and sequences of tensors, nested at will; a name joins the keys by
    dots, such as ``state_dict.model.norm.weight``. All that is no tensor is passed by. Waits for a GPU once.
    """
    names, flags = [], []
    for name, tensor in named_tensors(values):
        if tensor.is_floating_point() or tensor.is_complex():
            names.append(name)
            flags.append(torch.isfinite(tensor.detach()).all())
    by_device: dict[torch.device, list[int]] = {}
    for index, flag in enumerate(flags):
        by_device.setdefault(flag.device, []).append(index)
    finite: dict[int, bool] = {}
    for indices in by_device.values():
        finite |= dict(zip(indices, torch.stack([flags[i] for i in indices]).tolist(), strict=True))
    return [name for index, name in enumerate(names) if not finite[index]]


def named_tensors(values: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of nested mappings and sequences, with their names."""
    if isinstance(values, Tensor):
        yield name, values
        return
    if isinstance(values, Mapping):
        items: Any = values.items()
    elif isinstance(values, list | tuple):
        items = enumerate(values)
    else:
        return
    for key, value in items:
        yield from named_tensors(value, f"{name}.{key}" if name else str(key))
