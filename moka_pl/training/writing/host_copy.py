"""Copies of many tensors in the host's memory, in few transfers."""

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

#: Bytes of a transfer, at most, unless a single tensor has more: a GPU needs as much again for a moment.
_TRANSFER = 1 << 24

_CONSTANT = (int, float, str, bool, bytes, type(None))


def host_copy(values: Any) -> Any:
    """Copies nested values with their tensors, which then lie in the host's memory, each in its own storage.

    Whatever is changed later, in place or by a GPU that has been told to, the copy keeps. Small tensors are
    joined on their device and copied together: a GPU is waited for a few times, not once a tensor.

    Raises:
        TypeError: Something in it cannot be copied.
        RuntimeError: The device has no memory left for a transfer, or a tensor cannot be copied.
    """
    tensors: dict[int, Tensor] = {}
    _collect(values, tensors)
    return _rebuilt(values, dict(_copied(tensors)))


def _collect(value: Any, tensors: dict[int, Tensor]) -> None:
    kind = type(value)
    if kind is Tensor:
        tensors[id(value)] = value
    elif kind is dict:
        for one in value.values():
            _collect(one, tensors)
    elif kind is list or kind is tuple:
        for one in value:
            _collect(one, tensors)


def _rebuilt(value: Any, copies: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in _CONSTANT:
        return value
    if kind is Tensor:
        return copies[id(value)]
    if kind is dict:
        return {key: _rebuilt(one, copies) for key, one in value.items()}
    if kind is list or kind is tuple:
        return kind([_rebuilt(one, copies) for one in value])
    return copy.deepcopy(value, dict(copies))


def _copied(tensors: dict[int, Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Yields copies under the tensors' keys."""
    joined: dict[torch.device, list[int]] = {}
    for key, tensor in tensors.items():
        small = 0 < tensor.nbytes < _TRANSFER
        if small and tensor.layout is torch.strided and tensor.is_contiguous():
            joined.setdefault(tensor.device, []).append(key)
        else:
            yield key, tensor.detach().to("cpu", copy=True)
    for keys in joined.values():
        keys.sort(key=lambda key: -tensors[key].element_size())  # so that each stays aligned
        for some in _transfers(keys, tensors):
            yield from zip(some, _together([tensors[key].detach() for key in some]), strict=True)


def _transfers(keys: Iterable[int], tensors: dict[int, Tensor]) -> Iterator[list[int]]:
    """Yields the keys of tensors that are copied together."""
    some: list[int] = []
    room = _TRANSFER
    for key in keys:
        if some and tensors[key].nbytes > room:
            yield some
            some, room = [], _TRANSFER
        some.append(key)
        room -= tensors[key].nbytes
    yield some


def _together(tensors: list[Tensor]) -> Iterator[Tensor]:
    """Yields copies of contiguous tensors of a device, in the same order, made in one transfer."""
    data = torch.cat([tensor.reshape(-1).view(torch.uint8) for tensor in tensors]).cpu().numpy()
    begin = 0
    for tensor in tensors:
        # A storage of its own: a file would else hold all of them for each.
        one = torch.frombuffer(data, dtype=tensor.dtype, count=tensor.numel(), offset=begin)
        yield one.view(tensor.shape)
        begin += tensor.nbytes
