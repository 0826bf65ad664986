import math

import pytest
import torch

from moka_pl.errors import ConfigError
from moka_pl.training.schedule import WarmupDecay


def optimizer(lr=1.0):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)


def rates(scheduler, steps):
    """The learning rates that `steps` optimizer steps use."""
    seen = []
    for _ in range(steps):
        seen.append(scheduler.optimizer.param_groups[0]["lr"])
        scheduler.optimizer.step()
        scheduler.step()
    return seen


def test_linear():
    found = rates(WarmupDecay(optimizer(2.0), warmup=2, decay="linear", min_lr_ratio=0.5, total_steps=6), 6)
    # Rise to 2 in two steps, then fall from 2 towards 1 in the four steps left.
    assert found == pytest.approx([1.0, 2.0, 2.0, 1.75, 1.5, 1.25])


def test_cosine():
    found = rates(WarmupDecay(optimizer(), warmup=1, decay="cosine", total_steps=5), 5)
    assert found == pytest.approx([1.0] + [(1 + math.cos(math.pi * p / 4)) / 2 for p in range(4)])


def test_constant_and_no_warmup():
    assert rates(WarmupDecay(optimizer(), warmup=0, decay="constant", total_steps=3), 3) == [1.0] * 3


def test_warmup_as_a_share_of_all_steps():
    found = rates(WarmupDecay(optimizer(), warmup=0.25, decay="constant", total_steps=16), 6)
    assert found == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 1.0])


def test_steps_beyond_the_end_stay_at_the_minimum():
    found = rates(WarmupDecay(optimizer(), warmup=0, min_lr_ratio=0.1, total_steps=2), 5)
    assert found[2:] == pytest.approx([0.1] * 3)


def test_total_steps_set_later():
    scheduler = WarmupDecay(optimizer(3.0), warmup=0.5, decay="linear")
    scheduler.set_total_steps(8)
    assert scheduler.get_last_lr() == [0.75]
    same = WarmupDecay(optimizer(3.0), warmup=0.5, decay="linear", total_steps=8)
    assert rates(scheduler, 8) == rates(same, 8)


def test_state_goes_on():
    options = {"warmup": 2, "total_steps": 9}
    whole = rates(WarmupDecay(optimizer(), **options), 9)
    first = WarmupDecay(optimizer(), **options)
    rates(first, 4)
    second = WarmupDecay(optimizer(), **options)
    second.load_state_dict(first.state_dict())
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    assert rates(second, 5) == whole[4:]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup must be 0 or more, not -1"),
        ({"min_lr_ratio": 1.5}, "min_lr_ratio must be between 0 and 1, not 1.5"),
        ({"decay": "cosinus"}, "unknown decay 'cosinus'; choose cosine, linear or constant"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ConfigError, match=message):
        WarmupDecay(optimizer(), **options)
