"""Which tensors hold a NaN or an infinity."""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

_PLAIN = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def non_finite_names(values: Any) -> list[str]:
    """Returns the names of the floating-point tensors that hold a NaN or an infinity, in their order.

    ``values`` is a tensor, or mappings and sequences of tensors, nested at will; a name joins the keys by
    dots, such as ``state_dict.model.norm.weight``. All that is no tensor is passed by. Waits
    for a GPU once for each type of tensors, if all are finite.
    """
    names, tensors = [], []
    for name, tensor in named_tensors(values):
        if tensor.is_floating_point() or tensor.is_complex():
            names.append(name)
            tensors.append(tensor.detach())
    if _all_finite(tensors):
        return []
    flags = [torch.isfinite(tensor).all() for tensor in tensors]
    by_device: dict[torch.device, list[int]] = {}
    for index, flag in enumerate(flags):
        by_device.setdefault(flag.device, []).append(index)
    finite: dict[int, bool] = {}
    for indices in by_device.values():
        finite |= dict(zip(indices, torch.stack([flags[i] for i in indices]).tolist(), strict=True))
    return [name for index, name in enumerate(names) if not finite[index]]


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether the largest magnitudes, found for many tensors at once, are finite; False if unknown."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.dtype not in _PLAIN or tensor.layout is not torch.strided:
            return False
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dtype), []).append(tensor)
    largest = [get_total_norm(group, math.inf) for group in groups.values()]
    return all(math.isfinite(one) for one in map(float, largest))


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
