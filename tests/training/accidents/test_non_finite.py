"""Steps that are not finite are skipped and named, and nothing but such steps ends the run."""

import math
from copy import deepcopy

import peft
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from shared.states import equal

from moka_pl.adapters import FullFineTuning, adapter_state
from moka_pl.adapters.reading import read_adapter_state
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, GracefulInterrupt, RunCheckpoint
from moka_pl.errors import ConfigError, NonFiniteError
from moka_pl.ops.finite import non_finite_names
from moka_pl.training.accidents.non_finite import NonFiniteSteps
from moka_pl.training.module import MokaModule

LAYER = "model.layers.0.mlp.down_proj"


class Spoil(Callback):
    """Makes the loss or one gradient of some micro-batches NaN; keeps weights and optimizer of each step."""

    def __init__(self, *batches, gradient=False, value=math.nan, lasting=False):
        self.batches, self.gradient, self.value, self.lasting = batches, gradient, value, lasting
        self.on, self.states, self.adapters, self.rows, self.count = False, [], [], [], -1

    def on_train_start(self, trainer, pl_module):
        layer = pl_module.model.get_submodule(LAYER)
        layer.register_forward_hook(lambda module, args, out: out * self.value if self.on else None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1
        if self.count in self.batches:
            self.rows.append(pl_module.tokenizer.decode(batch["input_ids"][0]))
        self.on = self.count in self.batches and not self.gradient

    def on_after_backward(self, trainer, pl_module):
        if self.gradient and self.count in self.batches:
            next(p for p in pl_module.parameters() if p.requires_grad).grad.view(-1)[0] = self.value

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.on = self.on and self.lasting

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.on = False
        if trainer.global_step > len(self.states):
            state = {n: p.detach().clone() for n, p in pl_module.named_parameters() if p.requires_grad}
            self.adapters.append({n: t.clone() for n, t in adapter_state(pl_module.causal_lm).items()})
            self.states.append((state, deepcopy(trainer.optimizers[0].state_dict()["state"])))


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1, fused=True),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
}


@pytest.mark.parametrize("gradient", [False, True], ids=["loss", "gradient"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        ("AdamW", {}),
        ("AdamW", {"accumulate_grad_batches": 2}),  # the second half of the second step's batch
        ("AdamW", {"gradient_clip_val": 0.1}),
        ("fused", {}),
        ("SGD", {"gradient_clip_val": 0.1, "gradient_clip_algorithm": "value"}),
        ("Adagrad", {}),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing(
    make_module, make_data, make_trainer, optimizer, options, gradient
):
    bad = 3 if "accumulate_grad_batches" in options else 1
    spoil, module = Spoil(bad, gradient=gradient), make_module(optimizer=OPTIMIZERS[optimizer])
    with pytest.warns(UserWarning, match="step 2 is skipped: its (loss is nan|gradient has the norm nan)"):
        make_trainer(spoil, max_steps=3, **options).fit(module, make_data())
    first, second, third = spoil.states
    assert equal(second, first)
    assert not equal(third, second)
    assert non_finite_names(third) == []
    assert module.trainer.lr_scheduler_configs[0].scheduler.last_epoch == 3  # number and schedule go on


@pytest.mark.parametrize("adapter", [peft.LoraConfig(r=2, target_modules=["v_proj"]), FullFineTuning()])
def test_other_methods(make_data, make_trainer, adapter):
    plain = isinstance(adapter, FullFineTuning)
    base = BackboneConfig("tiny", weights="random", quantization="none" if plain else "nf4")
    spoil = Spoil(1)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        make_trainer(spoil, max_steps=2).fit(MokaModule(base, adapter), make_data())
    assert equal(spoil.states[1], spoil.states[0])


@pytest.mark.parametrize("packing", [False, True])
def test_names_step_layer_and_rows(make_module, make_data, make_trainer, packing):
    spoil = Spoil(1, lasting=True)
    with pytest.warns(UserWarning, match="is skipped") as seen:
        make_trainer(spoil, max_steps=2).fit(make_module(), make_data(packing=packing))
    said = next(str(w.message) for w in seen if "is skipped" in str(w.message))
    assert said.startswith("step 2 is skipped: its loss is nan; first layer whose output is not finite: ")
    assert f": {LAYER}; rows: " in said
    assert "Skipped so far: 1" in said
    shown = said.split("rows: '")[1].split(" … ")
    row = " ".join(spoil.rows[0].split())
    assert row.startswith(shown[0])
    assert shown[1].split("'")[0] in row


def test_names_the_row_of_a_gradient(make_module, make_data, make_trainer):
    class Steep(Callback):
        """A layer whose gradient is infinite for the second row of the second batch; it changes no output."""

        def on_train_start(self, trainer, pl_module):
            self.ids, self.bad = None, None
            model = pl_module.model
            model.get_input_embeddings().register_forward_hook(self.look)
            model.get_submodule(LAYER).register_forward_hook(self.steepen)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 1:
                self.bad = batch["input_ids"][1]
                self.row = " ".join(pl_module.tokenizer.decode(self.bad).split())

        def look(self, module, args, out):
            self.ids = args[0]

        def steepen(self, module, args, out):
            if self.bad is None or self.ids.shape[1] != len(self.bad):
                return None
            rows = (self.ids == self.bad).all(dim=1).nonzero()[:, 0]
            return out.index_add(0, rows, (out[rows] - out[rows].detach()).clamp(min=0).sqrt())

    steep = Steep()
    with pytest.warns(UserWarning, match="is skipped") as seen:
        make_trainer(steep, max_steps=2).fit(make_module(), make_data())
    said = next(str(w.message) for w in seen if "is skipped" in str(w.message))
    assert (
        "its gradient has the norm nan; first layer whose gradient is not finite: model.model.layers.0"
        in said
    )
    shown = said.split("rows: ")[1].split(". Skipped")[0][1:-1]
    assert all(part in steep.row for part in shown.split(" … "))


def test_naming_draws_nothing_from_the_random_generators(train, monkeypatch):
    states = []
    for find in (NonFiniteSteps._find, lambda *args: ""):
        monkeypatch.setattr(NonFiniteSteps, "_find", find)
        with pytest.warns(UserWarning, match="step 1 is skipped"):
            states.append(train(Spoil(1), max_steps=4).state)
    assert equal(*states)


def test_only_steps_in_a_row_end_the_run(make_module, make_data, make_trainer):
    spoil, module = Spoil(1, 2, 4, 5), make_module(max_non_finite_steps=3)
    with pytest.warns(UserWarning, match="step 6 is skipped: .* Skipped so far: 4"):
        make_trainer(spoil, max_steps=7).fit(module, make_data())
    assert equal(spoil.states[5], spoil.states[3])


def test_ends_a_run_of_bad_data_with_the_weights_of_before(make_module, make_data, make_trainer, tmp_path):
    spoil, saved = Spoil(2, 3, 4), AdapterCheckpoint()
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(
            NonFiniteError, match=r"the last 3 steps \(3 to 5\) .* The weights of before are saved"
        ),
    ):
        make_trainer(spoil, saved).fit(make_module(max_non_finite_steps=3), make_data())
    stored = read_adapter_state(saved.last_path)
    assert equal(stored, spoil.adapters[1])


def test_weights_that_overflow_are_never_saved_over_finite_ones(
    make_module, make_data, make_trainer, tmp_path
):
    class Overflow(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 4:
                trainer.optimizers[0].param_groups[0]["lr"] = 1e38

    saved = AdapterCheckpoint()
    module = make_module(max_non_finite_steps=2)
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(NonFiniteError, match="give no finite loss now; what was saved before is kept"),
    ):
        make_trainer(Overflow(), saved, val_check_interval=2).fit(module, make_data())
    assert non_finite_names(read_adapter_state(tmp_path / "adapters" / "last")) == []


def test_a_run_that_never_had_finite_weights_saves_no_adapter(
    make_module, make_data, make_trainer, tmp_path, caplog
):
    class Overflow(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            next(p for p in pl_module.parameters() if p.requires_grad).data.fill_(math.inf)

    module = make_module(max_non_finite_steps=2)
    with (
        caplog.at_level("INFO"),
        pytest.warns(UserWarning, match="the adapter of step 3 is not saved in"),
        pytest.raises(NonFiniteError, match="the last 2 steps"),
    ):
        make_trainer(Overflow(), AdapterCheckpoint()).fit(module, make_data())
    assert "Adapter of step" not in caplog.text
    assert not (tmp_path / "adapters").exists()


def test_an_overflow_by_the_last_step_is_not_saved(make_module, make_data, make_trainer, tmp_path):
    class Overflow(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 3:
                next(p for p in pl_module.parameters() if p.requires_grad).data.fill_(math.inf)

    with (
        pytest.warns(UserWarning, match="the adapter of step 3 is not saved in"),
        pytest.raises(NonFiniteError, match="the weights are not finite after the last step, 3"),
    ):
        make_trainer(AdapterCheckpoint(), Overflow(), max_steps=3).fit(make_module(), make_data())
    assert not (tmp_path / "adapters").exists()


def test_no_checkpoint_that_is_not_finite_replaces_an_older_one(train, tmp_path):
    class Overflow(Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            if trainer.global_step == 6:
                next(p for p in pl_module.parameters() if p.requires_grad).data.fill_(math.inf)

    saving = RunCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=2)
    with pytest.raises(
        NonFiniteError, match="no checkpoint is written after step 6: 1 tensors are not finite"
    ):
        train(Overflow(), saving, GracefulInterrupt())
    for name in ("last.ckpt", "epoch=0-step=4.ckpt"):
        stored = torch.load(tmp_path / name, weights_only=True)
        assert stored["global_step"] == 4
        assert non_finite_names(stored["state_dict"]) == []


def test_a_validation_loss_of_nan_is_never_the_best(make_module, make_data, make_trainer, tmp_path):
    class Blind(Callback):
        def on_validation_end(self, trainer, pl_module):
            trainer.callback_metrics["val/thing"] = torch.tensor(math.nan)

    saved = AdapterCheckpoint(monitor="val/thing")
    with pytest.warns(UserWarning, match="val/thing is nan after step 7, which never counts as the best"):
        make_trainer(Blind(), saved).fit(make_module(), make_data())
    assert saved.best_path is None


def test_the_skips_of_a_scaler_are_its_own(make_module, make_data, make_trainer):
    spoil = Spoil(1, gradient=True, value=math.inf)
    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=4.0))
    module = make_module()
    trainer = make_trainer(spoil, max_steps=3, plugins=[precision])
    trainer.fit(module, make_data())
    assert module._non_finite.numbers == []
    assert equal(spoil.states[1][0], spoil.states[0][0])


def test_lbfgs(make_module, make_data, make_trainer):
    module = make_module(optimizer=lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3))
    spoil = Spoil(1)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        make_trainer(spoil, max_steps=3).fit(module, make_data())
    assert equal(spoil.states[1][0], spoil.states[0][0])
    assert module._non_finite.numbers == [2]


def test_patience_is_at_least_one(make_module):
    with pytest.raises(ConfigError, match="max_non_finite_steps must be at least 1, not 0"):
        make_module(max_non_finite_steps=0)
