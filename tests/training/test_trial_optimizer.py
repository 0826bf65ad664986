import math

import pytest
import torch
from peft import LoraConfig
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR, ReduceLROnPlateau, StepLR

from moka_pl.errors import ConfigError
from moka_pl.training.learning_rates import LearningRateRatios
from moka_pl.training.schedule import WarmupDecay
from moka_pl.training.trial_optimizer import check_learns


def adam(**options):
    return {"optimizer": lambda parameters: torch.optim.AdamW(parameters, **options)}


class NeedsGPU(torch.optim.SGD):
    """An optimizer that has no kernel for CPUs."""

    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            if any(p.device.type == "cpu" for p in group["params"]):
                raise NotImplementedError("no kernel\nfor cpu")


class Draws(torch.optim.SGD):
    """An optimizer that draws random numbers."""

    def step(self, closure=None):
        torch.rand(3)
        super().step(closure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (adam(lr=-0.1), "refuses its options: Invalid learning rate: -0.1"),
        (adam(lr=math.nan), "Invalid learning rate: nan"),
        (adam(lr=math.inf), "AdamW: lr must be finite, not inf"),
        (adam(lr=1e30), r"AdamW: a learning rate of 1e\+30 cannot train"),
        (adam(lr=0.0), "with a learning rate of 0 nothing is trained"),
        (adam(weight_decay=-1.0), "Invalid weight_decay value: -1.0"),
        (adam(weight_decay=math.inf), "weight_decay must be finite"),
        (adam(betas=(1.0, 0.9)), "Invalid beta parameter at index 0"),
        (adam(betas=(0.9, math.nan)), "Invalid beta parameter at index 1"),
        (adam(eps=math.inf), "eps must be finite"),
        (adam(momentum=1), "unexpected keyword argument 'momentum'"),
        (
            {"optimizer": torch.optim.SparseAdam},
            "SparseAdam fails at its first step: .* dense grad.*such as torch.optim.AdamW",
        ),
        (
            adam(fused=True, foreach=True),
            "options: `fused` and `foreach` cannot be `True` together",
        ),
        ({"optimizer": torch.optim.Muon}, "refuses its options: Muon only supports 2D parameters"),
        (
            {"optimizer": NeedsGPU},
            "NeedsGPU fails at its first step: no kernel for cpu. Correct its",
        ),
        ({"lr_scheduler": lambda o: WarmupDecay(o, warmup=math.nan)}, "warmup must be 0 or more, not nan"),
        ({"lr_scheduler": lambda o: WarmupDecay(o, warmup=math.inf)}, "warmup must be 0 or more, not inf"),
        ({"lr_scheduler": lambda o: WarmupDecay(o, total_steps=0)}, "total_steps must be at least 1"),
        ({"lr_scheduler": lambda o: LambdaLR(o, {0: 1.0}.__getitem__)}, "LambdaLR refuses its options: 1$"),
        ({"lr_scheduler": lambda o: StepLR(o, 0)}, "StepLR refuses its options"),
        ({"lr_scheduler": lambda o: CosineAnnealingLR(o, 0)}, "CosineAnnealingLR refuses its options"),
        ({"lr_scheduler": lambda o: OneCycleLR(o, -1, total_steps=5)}, "a learning rate of -0.04 cannot"),
        ({"lr_scheduler": lambda o: OneCycleLR(o, 1)}, "must define either total_steps"),
        ({"lr_scheduler": lambda o: ReduceLROnPlateau(o, factor=2)}, "Factor should be < 1.0"),
    ],
)
def test_what_cannot_train_is_refused_without_a_model(make_module, options, message):
    with pytest.raises(ConfigError, match=message) as caught:
        check_learns(make_module(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"learning_rate_ratios": LearningRateRatios(left=0, gate=0.5)},
        {"optimizer": lambda p: torch.optim.SGD(p, lr=10.0, momentum=0.9)},
        {"optimizer": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.1))},
        {"optimizer": torch.optim.Adafactor},
        {"optimizer": torch.optim.LBFGS},
        {"optimizer": Draws},
        {"lr_scheduler": lambda o: ReduceLROnPlateau(o)},
        {"lr_scheduler": lambda o: OneCycleLR(o, 0.1, total_steps=5)},
    ],
)
def test_what_can_train_passes(make_module, options):
    state = torch.get_rng_state()
    check_learns(make_module(**options))
    assert torch.equal(torch.get_rng_state(), state)  # a run draws the same numbers with it


def test_an_optimizer_for_gpus_is_tried_there(make_module):
    check_learns(make_module(optimizer=NeedsGPU), "meta")


def test_matrices_are_tried_as_such(make_module):
    module = make_module(optimizer=torch.optim.Muon)
    module.adapter = LoraConfig(r=2)
    check_learns(module)
