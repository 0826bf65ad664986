"""Steps that are not finite, on a GPU: skipped without waiting for it, where the optimizer takes a flag."""

import math
from copy import deepcopy
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from shared.states import equal
from torch.nn.attention import SDPBackend, sdpa_kernel

from moka_pl.adapters import MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.data import CommonsenseData
from moka_pl.training.accidents.non_finite import NonFiniteSteps
from moka_pl.training.launches import HostCopy
from moka_pl.training.module import MokaModule

pytestmark = pytest.mark.gpu

STEPS = 12


class Spoil(pl.Callback):
    """Makes one gradient of some steps NaN; keeps weights and optimizer of every step."""

    def __init__(self, *steps: int) -> None:
        self.steps = steps
        self.states: list[Any] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: Any, optimizer: Any) -> None:
        if trainer.global_step + 1 in self.steps:
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = math.nan

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        weights = [p.detach().clone() for p in module.parameters() if p.requires_grad]
        self.states.append((weights, deepcopy(trainer.optimizers[0].state_dict()["state"])))


def fit(spoil: Spoil, fused: bool, graphs: bool, packing: bool = False, **options: Any) -> MokaModule:
    pl.seed_everything(0, verbose=False)
    module = MokaModule(
        BackboneConfig("smollm2-135m", weights="random", compute_dtype="float32"),
        MokaConfig(components=4),
        optimizer=lambda p: torch.optim.AdamW(p, lr=2e-3, weight_decay=0.1, fused=fused),
        cuda_graphs=graphs,
    )
    trainer = pl.Trainer(
        accelerator="gpu",
        devices=1,
        max_steps=STEPS,
        callbacks=[spoil],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        **options,
    )
    data = CommonsenseData("sample", batch_size=8, prompt="cloze", packing=packing)
    trainer.fit(module, datamodule=data)
    return module


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.1}, {"accumulate_grad_batches": 2}])
@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_is_not_finite_changes_nothing(
    fused: bool, graphs: bool, options: dict[str, Any]
) -> None:
    spoil = Spoil(8, STEPS)
    with pytest.warns(UserWarning, match="step 8 is skipped: its gradient has the norm nan"):
        module = fit(spoil, fused, graphs, **options)
    batches = options.get("accumulate_grad_batches", 1)
    states = spoil.states[batches - 1 :: batches]
    assert equal(states[7], states[6])
    assert equal(states[11], states[10])
    assert not equal(states[8], states[7])
    assert module._non_finite.numbers == [8, STEPS]
    assert all(bool(torch.isfinite(weight).all()) for weight in states[-1][0])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_finite_steps_are_bit_for_bit_those_without_the_check(
    fused: bool, packing: bool, monkeypatch
) -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        checked, unchecked = Spoil(), Spoil()
        # Of attention's kernels only these have a gradient of the same bits each time where warnings suffice.
        with sdpa_kernel(SDPBackend.MATH):
            fit(checked, fused, not packing, packing)
            monkeypatch.setattr(NonFiniteSteps, "check", lambda *args: None)
            monkeypatch.setattr(NonFiniteSteps, "finish", lambda *args: None)
            fit(unchecked, fused, not packing, packing)
    finally:
        torch.use_deterministic_algorithms(False)
    assert equal(checked.states, unchecked.states)


def test_a_fused_step_does_not_wait_for_the_gpu() -> None:
    """Asking for a value before the work that gives it is done raises an error here."""
    weight = torch.nn.Parameter(torch.ones(8, device="cuda"))
    module = fit(Spoil(), fused=True, graphs=False)
    optimizer = module.trainer.optimizers[0]
    steps = module._non_finite
    steps.begin()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        values = torch.stack([weight.sum(), weight.norm()])
        steps.check(optimizer, values, HostCopy(values))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps._pending is not None


def test_a_scaler_goes_on_scaling() -> None:
    spoil = Spoil()
    module = fit(spoil, fused=False, graphs=False, precision="16-mixed")
    assert module._non_finite.numbers == []
    assert all(bool(torch.isfinite(weight).all()) for weight in spoil.states[-1][0])
