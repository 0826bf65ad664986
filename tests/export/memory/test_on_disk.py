"""Large weights in a mapped file."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from moka_pl.export.memory import on_disk
from moka_pl.export.memory.on_disk import put_on_disk


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """An embedding and a head that share a weight, and a small layer."""
    monkeypatch.setattr(on_disk, "_LARGE", 1000)
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(50, 8), "head": nn.Linear(8, 50), "small": nn.Linear(2, 2)}
    )
    model["head"].weight = model["embedding"].weight
    return model


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in model.named_parameters()}


def test_numbers_and_ties_stay(model: nn.Module, tmp_path: Path) -> None:
    before, was = {k: t.clone() for k, t in model.state_dict().items()}, addresses(model)
    put_on_disk(model, tmp_path, 0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert {name for name, address in addresses(model).items() if address != was[name]} == {
        "embedding.weight"
    }
    assert model["head"].weight is model["embedding"].weight
    assert not any(tmp_path.iterdir())
    with torch.no_grad():  # as rounding does
        model["embedding"].weight.mul_(2)
    assert torch.equal(model["head"].weight, 2 * before["head.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, model: nn.Module, tmp_path: Path) -> None:
    before = model.to(dtype)["head"].weight.detach().clone()
    on_disk._LARGE //= 2
    put_on_disk(model, tmp_path, 0)
    assert torch.equal(model["head"].weight, before)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux tells what is mapped")
def test_the_file_goes_with_the_weights(model: nn.Module, tmp_path: Path) -> None:
    def mapped() -> bool:
        return f"{tmp_path.resolve()}{os.sep}" in Path("/proc/self/maps").read_text()

    put_on_disk(model, tmp_path, 0)
    assert mapped()
    model["embedding"].weight = model["head"].weight = nn.Parameter(torch.ones(50, 8))
    assert not mapped()


def test_the_room_of_the_export_is_not_taken(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    was = addresses(model)
    monkeypatch.setattr("moka_pl.utils._free", lambda folder: 50 * 8 * 4 + 99)
    put_on_disk(model, tmp_path, 100)
    assert addresses(model) == was
    put_on_disk(model, tmp_path, 99)
    assert addresses(model) != was


def test_a_disk_that_is_full_by_then_changes_nothing(
    model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(**options: object) -> None:
        raise OSError(28, "No space left on device")

    was = addresses(model)
    monkeypatch.setattr(on_disk, "TemporaryFile", full)
    put_on_disk(model, tmp_path, 0)
    assert addresses(model) == was
