"""A safetensors file, written tensor by tensor."""

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moka_pl.export.memory.shard import Planned, write_safetensors

DTYPES = ("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool")


def planned(tensors: dict[str, Tensor]) -> list[Planned]:
    return [
        Planned(name, tensor.dtype, tuple(tensor.shape), lambda tensor=tensor: tensor)
        for name, tensor in tensors.items()
    ]


def test_the_file_is_that_of_safetensors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    tensors = {
        f"layers.{i}.{kind}": torch.randn(3, 5).to(getattr(torch, kind)) for i, kind in enumerate(DTYPES)
    }
    tensors |= {
        "b": torch.randn(()),
        'ä"\\': torch.randn(2),
        "a": torch.zeros(0, 4),
        "c": torch.randn(4, 2).t(),
    }
    write_safetensors(tmp_path / "ours", planned(tensors), {"format": "pt"})
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    read = load_file(tmp_path / "ours")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())


def test_one_tensor_at_a_time_is_there(tmp_path: Path) -> None:
    alive: list[weakref.ref] = []

    def make() -> Tensor:
        assert not any(reference() is not None for reference in alive)
        made = torch.ones(8)
        alive.append(weakref.ref(made))
        return made

    write_safetensors(tmp_path / "file", [Planned(f"{i}", torch.float32, (8,), make) for i in range(3)], {})
    assert len(alive) == 3


@pytest.mark.parametrize("made", [torch.ones(3, 2), torch.ones(2, 3, dtype=torch.float16)], ids=str)
def test_another_tensor_than_the_head_tells_is_not_written(made: Tensor, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"layer is .* and was to be"):
        write_safetensors(tmp_path / "file", [Planned("layer", torch.float32, (2, 3), lambda: made)], {})
