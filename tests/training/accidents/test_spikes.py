"""Loss spikes are named, and undone if wanted; ordinary losses are none."""

import math
from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Callback
from shared.states import equal

from moka_pl.callbacks import RunCheckpoint
from moka_pl.data.batching.collate import collate_packs
from moka_pl.errors import ConfigError
from moka_pl.lm.scoring import TokenScores
from moka_pl.training.accidents import spikes
from moka_pl.training.accidents.spikes import SpikeOptions, _row_losses, is_spike

#: Losses of the demo, of every second step.
DEMO = [
    5.41,
    2.37,
    3.48,
    3.2,
    2.27,
    3.5,
    2.89,
    2.92,
    1.97,
    2.28,
    1.37,
    3.21,
    2.97,
    3.11,
    2.8,
    3.56,
    2.53,
    2.02,
]
DEMO += [3.36, 2.87, 2.79, 2.51, 2.25]

THRESHOLD = SpikeOptions().threshold


def alarms(losses):
    window = spikes._WINDOW
    return [i for i, loss in enumerate(losses) if is_spike(loss, losses[max(0, i - window) : i], THRESHOLD)]


def test_ordinary_losses_are_no_spikes():
    assert alarms(DEMO * 4) == []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, generator=generator).double()
    falling = 2 + 6 * torch.exp(-torch.arange(2000) / 100)  # in the warm-up
    exponential = -torch.rand(2000, generator=generator, dtype=torch.float64).log()
    for losses in (falling * (0.1 * noise).exp(), (0.3 * noise).exp(), exponential, torch.full((300,), 1e-7)):
        assert alarms(losses.tolist()) == []


@given(st.integers(20, 300), st.floats(0.5, 3), st.floats(0.0, 0.3), st.integers(0, 99))
def test_a_loss_of_wrong_labels_is_one(steps, level, spread, seed):
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(seed)).tanh()
    losses = (level * (spread * noise).exp()).tolist()
    assert alarms([*losses, 20 * level, *losses]) == [steps]


def test_another_level_is_said_of_no_more_than_a_few_steps():
    assert alarms([1.0] * 50 + [4.0] * 200 + [1.0] * 50) == [50, 51, 52, 53]


class Spike(Callback):
    """Multiplies the logits of some steps; keeps weights and optimizer after every step."""

    def __init__(self, *steps, factor=100.0):
        self.steps, self.factor, self.on = steps, factor, False
        self.states, self.rows = {}, {}

    def on_train_start(self, trainer, pl_module):
        norm = pl_module.causal_lm.model.norm
        norm.register_forward_hook(lambda module, args, out: out * self.factor if self.on else None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        step = trainer.global_step + 1
        self.on = step in self.steps
        self.rows.setdefault(step, []).extend(batch["rows"])

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.on = False
        weights = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
        state = deepcopy(trainer.optimizers[0].state_dict()["state"])
        self.states[trainer.global_step] = (weights, state)


@pytest.fixture
def fit(make_module, make_data, make_trainer, monkeypatch):
    """Trains steps of two rows in two micro-batches; four losses are enough to compare with."""
    monkeypatch.setattr(spikes, "_LEAST", 4)

    def run(spike, *callbacks, resumed=None, **options):
        module = make_module(lr=1e-2, loss_spikes=SpikeOptions(**options), adapter={"dropout": 0.1})
        trainer = make_trainer(
            spike,
            *callbacks,
            max_steps=8,
            max_epochs=2,
            limit_val_batches=0,
            accumulate_grad_batches=2,
            enable_checkpointing=bool(callbacks),
        )
        trainer.fit(module, make_data(batch_size=1), ckpt_path=resumed, weights_only=True)
        return module

    return run


@pytest.mark.slow
def test_names_step_and_rows_and_changes_nothing(fit):
    spike, unwatched = Spike(6), Spike(6)
    with pytest.warns(UserWarning, match="is a spike") as seen:
        module = fit(spike)
    said = [str(w.message) for w in seen if "is a spike" in str(w.message)]
    assert len(said) == 1
    assert module._spikes.numbers == [6]
    assert said[0].startswith("step 6: the loss of ")
    assert "the running median is 5." in said[0]
    numbered = said[0].split("; rows ")[1].split("; the first is '")[0]
    assert sorted(int(part.split()[0]) for part in numbered.split(", ")) == sorted(spike.rows[6])
    fit(unwatched, threshold=None)
    assert equal(spike.states, unwatched.states)


def test_goes_back_to_the_last_good_weights_and_resumes_exactly(fit, tmp_path):
    whole, resumed = Spike(7), Spike(7)
    saving = RunCheckpoint(dirpath=tmp_path, save_top_k=-1, every_n_train_steps=6, save_last=False)
    with pytest.warns(UserWarning, match=r"step 7: .* weights and optimizer are those after step 4 again"):
        fit(whole, saving, rollback_every=2)
    assert equal(whole.states[7], whole.states[4])
    assert not equal(whole.states[6], whole.states[4])
    assert not equal(whole.states[8], whole.states[7])
    path = tmp_path / "epoch=0-step=6.ckpt"
    with pytest.warns(UserWarning, match=r"those after step 4 again"):
        fit(resumed, rollback_every=2, resumed=path)
    assert equal(resumed.states, {step: whole.states[step] for step in (7, 8)})


@pytest.mark.slow
def test_goes_back_from_weights_that_overflowed(fit):
    class Overflow(Spike):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            if trainer.global_step == 4 and 4 in self.states:
                next(p for p in pl_module.parameters() if p.requires_grad).data.fill_(math.inf)

    spike = Overflow()
    with pytest.warns(
        UserWarning, match=r"step 6 is skipped: .* weights and optimizer are those after step 3"
    ):
        module = fit(spike, rollback_every=1)
    assert module._non_finite.numbers == [5, 6]
    assert equal(spike.states[6], spike.states[3])
    assert not equal(spike.states[7], spike.states[6])


def test_rows_of_packed_examples_are_told_apart():
    lengths, fillers = [[3, 4], [5], [2]], [False, False, True]
    packs = [[{"input_ids": [7] * n, "labels": [7] * n} for n in pack] for pack in lengths]
    batch = collate_packs(packs, fillers, 0) | {"rows": [11, 12, 13]}
    nll = torch.arange(9.0)  # 2, 3 and 4 tokens that are predicted
    module = SimpleNamespace(token_scores=lambda batch: TokenScores(nll, nll))
    rows = _row_losses(module, batch)
    assert [(row.number, row.loss, row.token) for row in rows] == [(11, 0.5, 0), (12, 3.0, 2), (13, 6.5, 5)]


def test_refuses_to_undo_steps_that_a_scaler_has_looked_at(make_module):
    module = make_module(loss_spikes=SpikeOptions(rollback_every=5))
    module._trainer = SimpleNamespace(
        precision_plugin=SimpleNamespace(scaler=object()), world_size=1, strategy=None
    )
    with pytest.raises(ConfigError, match=r"rollback_every is 5, which does not go with .* 16-mixed"):
        module._check_steps()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"threshold": 0.0}, "loss_spikes.threshold must be above 0, or null, not 0"),
        ({"threshold": math.nan}, "loss_spikes.threshold must be above 0"),
        ({"rollback_every": -1}, "loss_spikes.rollback_every must be 0 or more, not -1"),
        ({"rollback_every": 5, "threshold": None}, "with threshold null no loss is a spike"),
    ],
)
def test_options_that_cannot_work(options, said):
    with pytest.raises(ConfigError, match=said):
        SpikeOptions(**options)
