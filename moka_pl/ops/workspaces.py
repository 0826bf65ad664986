"""Buffers that small layers of one size share on a CPU, kept from call to call.

There memory that is new takes as long as the products that write it, and to make views of it takes as long
again. A workspace has both ready. What is in it counts only within one call.
"""

import threading
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from moka_pl.ops.layout import Shape

#: Entries of its large buffers up to which a workspace is kept: 4 MB in float32.
_LARGEST = 2**20

#: Workspaces of a kind that a thread keeps: more than a model has sizes of layers.
_MOST = 8


class _Workspace(Protocol):
    """Buffers and views of them.

    Attributes:
        entries: Numbers that the large ones hold.
    """

    entries: int


W = TypeVar("W", bound=_Workspace)


class _Kept(threading.local):
    """The workspaces of a thread: another one may compute at the same time."""

    def __init__(self) -> None:
        self.by_key: dict[tuple[Any, ...], Any] = {}


class Workspaces(Generic[W]):
    """The workspaces of one kind.

    Args:
        make: Makes one for shapes, the sizes it depends on, and a tensor of its dtype and device.
    """

    def __init__(self, make: Callable[..., W]) -> None:
        self._make = make
        self._kept = _Kept()

    def of(self, shapes: tuple[Shape, ...], *sizes: int, like: Tensor) -> W:
        """Returns a workspace, which another call may return again.

        Args:
            shapes: r shapes.
            *sizes: The sizes it depends on.
            like: A tensor of its dtype and device that was computed just now, and is no parameter.
        """
        # On a GPU a kept one would tie streams and recorded graphs to each other; other types stand for
        # tensors while something is traced.
        if like.device.type != "cpu" or type(like) is not Tensor:
            return self._make(shapes, *sizes, like)
        kept, key = self._kept.by_key, (shapes, sizes, like.dtype)
        found: W | None = kept.get(key)
        if found is None:
            with torch.inference_mode(False):  # what an evaluation makes first serves training, too
                found = self._make(shapes, *sizes, like)
            if found.entries <= _LARGEST:
                if len(kept) >= _MOST:
                    del kept[next(iter(kept))]  # the oldest
                kept[key] = found
        return found
