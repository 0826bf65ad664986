from collections import OrderedDict

import pytest
import torch
from torch import nn

from moka_pl.ops.finite import named_tensors
from moka_pl.training.writing import host_copy as module
from moka_pl.training.writing.host_copy import host_copy

DTYPES = [torch.float32, torch.bfloat16, torch.uint8, torch.bool, torch.int64, torch.complex64]


def values():
    tensors = {str(dtype): (torch.randn(5, 3) * 3).to(dtype) for dtype in DTYPES}
    return {
        "state_dict": tensors | {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 2)},
        "turned": torch.randn(4, 3).T,
        "part": torch.randn(6, 6)[1:3],
        "own": nn.Parameter(torch.ones(3)),
        "lists": [1, "two", None, (torch.arange(3), [4.5])],
        "ordered": OrderedDict(a=[torch.ones(2)]),
    }


@pytest.mark.parametrize("transfer", [1, 64, 1 << 24])
def test_the_copy_is_the_same_and_stays_so(monkeypatch, transfer):
    monkeypatch.setattr(module, "_TRANSFER", transfer)
    torch.manual_seed(0)
    given = values()
    torch.manual_seed(0)
    expected = values()
    copied = host_copy(given)
    with torch.no_grad():
        for _, tensor in named_tensors(given):
            tensor.zero_()
    given["lists"].append(5)
    given["state_dict"].clear()
    assert copied["lists"][:3] == [1, "two", None]
    assert len(copied["lists"]) == 4
    assert copied["lists"][3][1] == [4.5]
    assert type(copied["ordered"]) is OrderedDict
    found = dict(named_tensors(copied))
    for name, tensor in named_tensors(expected):
        assert type(found[name]) is type(tensor)
        assert found[name].dtype == tensor.dtype
        assert found[name].stride() == tensor.stride()
        assert torch.equal(found[name], tensor), name


def test_each_has_a_storage_of_its_own():
    copied = host_copy([torch.ones(3, dtype=torch.uint8), torch.ones(5), torch.ones(2, dtype=torch.float64)])
    assert [one.untyped_storage().nbytes() for one in copied] == [3, 20, 16]
    assert [one.data_ptr() % one.element_size() for one in copied] == [0, 0, 0]


def test_small_tensors_are_copied_together(monkeypatch):
    joined, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda tensors: joined.append(len(tensors)) or cat(tensors))
    monkeypatch.setattr(module, "_TRANSFER", 4000)
    host_copy([torch.ones(10) for _ in range(201)] + [torch.ones(1000)])
    assert joined == [100, 100, 1]


def test_what_cannot_be_copied_is_told():
    with pytest.raises(TypeError):
        host_copy({"generator": (number for number in range(3))})
