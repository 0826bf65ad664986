"""Writes a safetensors file tensor by tensor, so that one at a time is in memory."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.export.memory.on_disk import bytes_of

#: How safetensors calls what a model may hold, in the order in which it writes them: the wider, the earlier.
_NAMES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
#: The head's length is a multiple of this.
_ALIGNED = 8


class Planned(NamedTuple):
    """A tensor that is made when it is its turn.

    Attributes:
        name: Its name.
        dtype: Its dtype.
        shape: Its sizes.
        make: Makes it, on the CPU.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        """How many bytes it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def write_tensors(file: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes tensors that are made already, the same ones to the same bytes.

    ``save_file`` puts several keys of ``metadata`` in another order each time.

    Args:
        file: The file.
        tensors: What to write, in any order.
        metadata: What the file says of itself.
    """
    planned = [
        Planned(name, tensor.dtype, tuple(tensor.shape), tensor.contiguous)
        for name, tensor in tensors.items()
    ]
    write_safetensors(file, planned, metadata)


def write_safetensors(file: Path, tensors: list[Planned], metadata: dict[str, str]) -> None:
    """Writes a file, byte by byte the one that ``safetensors.torch.save_file`` writes.

    Args:
        file: The file.
        tensors: What to write, in any order.
        metadata: What the file says of itself.
    """
    order = list(_NAMES)
    tensors = sorted(tensors, key=lambda one: (order.index(one.dtype), one.name))
    head: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for planned in tensors:
        begin, end = end, end + planned.bytes
        head[planned.name] = {
            "dtype": _NAMES[planned.dtype],
            "shape": list(planned.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(head, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _ALIGNED)
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for planned in tensors:
            made = planned.make()
            if (made.dtype, tuple(made.shape)) != (planned.dtype, planned.shape):
                raise RuntimeError(
                    f"{planned.name} is {tuple(made.shape)} in {made.dtype}, and was to be {planned.shape} "
                    f"in {planned.dtype}"
                )
            opened.write(bytes_of(made.contiguous()))
            del made  # before the next is made
