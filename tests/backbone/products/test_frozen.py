"""4-bit layers whose products this package computes; ``tests/gpu`` runs its kernel."""

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn

from moka_pl.backbone.products import frozen
from moka_pl.backbone.quantization import is_four_bit, quantised_linear


def saved_and_loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_a_copy_reads_its_own_weights(copied: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[nn.Module] = []

    def weight(layer: Any, dtype: torch.dtype) -> torch.Tensor:
        read.append(layer)
        return torch.full((layer.out_features, layer.in_features), 2.0, dtype=dtype)

    monkeypatch.setattr(frozen, "_computes", lambda layer, x: True)  # else only on a GPU
    monkeypatch.setattr(frozen, "_weight", weight)
    stored = quantised_linear(nn.Linear(64, 32), torch.randn(32, 64), "nf4", True, torch.float32)
    layers = nn.Sequential(stored, nn.Linear(32, 8)).requires_grad_(False)
    assert frozen.fuse_products(layers) == 1
    twin = copied(layers)
    assert is_four_bit(twin[0])
    x = torch.ones(3, 64, requires_grad=True)
    out = twin[0](x)
    assert torch.equal(out, torch.full((3, 32), 128.0))
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], torch.full((3, 64), 64.0))
    assert all(layer is twin[0] for layer in read)
    assert len(read) == 2
    monkeypatch.undo()
    assert torch.equal(twin[0](x), layers[0](x))
