import math

import pytest
import torch
from torch import nn

from moka_pl.ops.finite import non_finite_names


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64]
)
def test_finds_every_kind_of_value_in_every_kind_of_number(bad, dtype):
    tensors = {"good": torch.ones(3, dtype=dtype), "bad": torch.tensor([0, bad, 1], dtype=dtype)}
    assert non_finite_names(tensors) == ["bad"]


def test_looks_into_what_a_checkpoint_nests():
    parameter = nn.Parameter(torch.tensor([math.inf]))
    checkpoint = {
        "epoch": 1,
        "score": math.inf,  # no tensor
        "state_dict": {"model.a": torch.zeros(2), "model.b": parameter},
        "optimizer_states": [
            {"state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.tensor([math.nan])}}}
        ],
        "rng": (torch.arange(3), None),
    }
    assert non_finite_names(checkpoint) == ["state_dict.model.b", "optimizer_states.0.state.0.exp_avg"]


def test_nothing_is_finite():
    assert non_finite_names({}) == []
    assert non_finite_names({"empty": torch.zeros(0)}) == []
