"""Modules that compute by another forward method, and copies of them."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moka_pl.lm.replaced_forward import forward_maker, replace_forward, restore_forward


def scaled(kind: Any, factor: float) -> Any:
    """The forward method of a class, times a number."""

    def forward(layer: nn.Module, x: Tensor) -> Tensor:
        return factor * kind.forward(layer, x)

    return forward


COPIES = {
    "deep": copy.deepcopy,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "pickled by the oldest protocol": lambda module: pickle.loads(pickle.dumps(module, 0)),
}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_computes_so_too_with_its_own_weights(how: str) -> None:
    layer, other = nn.Linear(3, 2), nn.Linear(3, 2)
    x = torch.randn(4, 3)
    plain = layer(x)
    replace_forward(layer, scaled, 2.0)
    replace_forward(layer, scaled, 5.0)
    twin = COPIES[how](layer)
    assert torch.equal(twin(x), 5 * (2 * plain))
    twin.weight, twin.bias = other.weight, other.bias
    assert torch.equal(twin(x), 5 * (2 * other(x)))
    assert torch.equal(layer(x), 5 * (2 * plain))
    assert (type(twin), type(twin).__name__, str(twin)) == (type(layer), "Linear", str(other))


def test_it_is_undone_step_by_step() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    plain = layer(x)
    assert forward_maker(layer) is None
    replace_forward(layer, scaled, 2.0)
    replace_forward(layer, scaled, 5.0)
    restore_forward(layer)
    assert forward_maker(layer) is scaled
    assert torch.equal(layer(x), 2 * plain)
    restore_forward(layer)
    assert type(layer) is nn.Linear
    assert forward_maker(layer) is None
    assert torch.equal(layer(x), plain)
