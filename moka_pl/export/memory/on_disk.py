"""Weights that lie in a file and are mapped: the system drops and reads their pages as it has room."""

import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.utils import space_shortage

#: Bytes from which on a weight is put on disk.
_LARGE = 2**26


def put_on_disk(model: nn.Module, folder: Path, spared: int) -> None:
    """Moves the large weights of a model that are not quantised, its embedding and head, into a file.

    The file has no name: nothing is left of it once the weights are gone, however the process ends. Where the
    disk has no room, or the model lies elsewhere than in memory, all stays as it is.

    Args:
        model: The model, of which only weights beside quantised ones are worth it.
        folder: Where to write.
        spared: Bytes that the disk must have left.
    """
    for parameter in model.parameters():
        large = type(parameter) is nn.Parameter and parameter.nbytes >= _LARGE
        if not large or parameter.device.type != "cpu" or not parameter.is_floating_point():
            continue
        if space_shortage(folder, parameter.nbytes + spared) is not None:
            return
        try:
            parameter.data = _mapped(parameter.detach(), folder)
        except OSError:  # a disk that is full by now, or one that maps no files
            return


def _mapped(tensor: Tensor, folder: Path) -> Tensor:
    """The same numbers in a file, which lives as long as they do."""
    tensor = tensor.contiguous()
    with TemporaryFile(dir=folder) as file:
        file.write(bytes_of(tensor))
        file.flush()
        pages = mmap.mmap(file.fileno(), 0)
    return torch.frombuffer(pages, dtype=tensor.dtype).view(tensor.shape)


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, not copied."""
    raw: Any = tensor.flatten().view(torch.uint8).numpy()
    return memoryview(raw)
