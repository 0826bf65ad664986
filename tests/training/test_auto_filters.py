"""``filters: auto`` and ``start: gradient`` inside a run."""

import json
import logging
import random
from collections import Counter
from dataclasses import replace

import numpy
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from shared.counts import factor_entries

from moka_pl.adapters import MokaConfig, adapter_state, inject_adapter, moka_layers, read_adapter, unload
from moka_pl.adapters.filter_search.gradients import weight_gradients
from moka_pl.adapters.filter_search.nearest import nearest_products
from moka_pl.adapters.filter_search.search import layer_budgets
from moka_pl.callbacks import AdapterCheckpoint
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.lm.scoring import score_tokens
from moka_pl.training import auto_filters

AUTO = {"filters": "auto", "components": 3, "dropout": 0.1}


class Batches(Callback):
    """Keeps the token ids of every training batch."""

    def __init__(self) -> None:
        self.ids: list[list] = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.ids.append(batch["input_ids"].tolist())


@pytest.fixture
def fit(make_module, make_data, make_trainer, step_log):
    """Fits the tiny model; returns module, losses by step, batches, and the final adapter."""

    def run(adapter: dict, *callbacks, data: dict | None = None, ckpt_path=None, module=None, **options):
        module = module or make_module(adapter=adapter)
        steps, batches = step_log(), Batches()
        keeping = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
        defaults = {"accumulate_grad_batches": 2, "enable_checkpointing": keeping}
        trainer = make_trainer(steps, batches, *callbacks, **(defaults | options))
        trainer.fit(module, make_data(**(data or {})), ckpt_path=ckpt_path, weights_only=True)
        return module, steps.losses, batches.ids, adapter_state(module.causal_lm)

    return run


def listed(module) -> dict[str, list[list[int]]]:
    return {
        name: [list(s[:4]) for s in layer.shapes] for name, layer in moka_layers(module.causal_lm).items()
    }


@pytest.mark.parametrize(
    "data", [{}, {"packing": True, "batch_size": 1, "num_workers": 1}], ids=["padded", "packed"]
)
def test_a_run_that_chooses_is_the_run_with_what_it_chose(fit, data, caplog, monkeypatch) -> None:
    caplog.set_level(logging.INFO, "lightning.pytorch")
    read = auto_filters.first_batches

    def drawing(*args):
        torch.rand(1), random.random(), numpy.random.rand()
        return read(*args)

    monkeypatch.setattr(auto_filters, "first_batches", drawing)
    module, losses, batches, state = fit(AUTO, data=data)
    filters = module.adapter.filters
    assert filters == listed(module)
    assert len({json.dumps(shapes) for shapes in filters.values()}) > 1
    again, same_losses, same_batches, same_state = fit(AUTO | {"filters": filters}, data=data)
    assert again.adapter == module.adapter
    assert same_batches == batches
    assert same_losses == losses
    assert len(losses) > 1
    assert all(torch.equal(same_state[name], tensor) for name, tensor in state.items())
    # As if nothing had been read before: one report of the epoch's batches each.
    told = caplog.text
    assert told.count("batches per epoch") == 2
    assert told.count("filters chosen in 4 layers") == 1


def test_the_budget_is_that_of_diverse_or_the_given_one(fit) -> None:
    for budget in (None, 1500):
        module, *_ = fit(AUTO | {"budget": budget}, max_steps=1)
        layers = moka_layers(module.causal_lm).values()
        used = sum(shape.num_parameters for layer in layers for shape in layer.shapes)
        sizes = [(layer.out_features, layer.in_features) for layer in layers]
        usual = factor_entries(sizes, "diverse", 3)
        assert 0.8 * usual < used <= (budget or usual)
        assert module.adapter.budget is None


def test_left_factors_start_along_the_gradient_and_delta_is_zero(fit, make_data, make_module) -> None:
    taken = {}

    class Look(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            taken["state"] = {k: v.clone() for k, v in adapter_state(pl_module.causal_lm).items()}
            taken["delta"] = [
                layer.get_delta_weight().abs().max() for layer in moka_layers(pl_module).values()
            ]

    options = {"components": 4, "filters": [[4, 4], [2, 8], [4, 4], [4, 4]], "start": "gradient"}
    module, *_ = fit(options, Look(), max_steps=1)
    assert not any(taken["delta"])
    assert read_start(module) == "gradient"
    unload(module.causal_lm)
    model = module.causal_lm
    batches = auto_filters.first_batches(module.trainer, 8)
    loss = lambda b: score_tokens(model, b["input_ids"], b["labels"]).nll.sum()  # noqa: E731
    for name, gradient in weight_gradients(model, module.adapted, batches, loss):
        (shape, other, *_) = module.adapter.shapes_of(name, *gradient.shape)
        pairs, _ = nearest_products(gradient.double(), shape, 3)
        found = [taken["state"][f"{name}.moka_A.{i}"].double() for i in (0, 2, 3)]
        for (left, _), own in zip(pairs, found, strict=True):
            assert float(own.norm()) == pytest.approx((shape.m_a / 3) ** 0.5, rel=1e-4)
            assert float((own * left).sum().abs() / own.norm()) == pytest.approx(1, abs=1e-3)
        left = nearest_products(gradient.double(), other)[0][0][0]
        own = taken["state"][f"{name}.moka_A.1"].double()
        assert float((own * left).sum().abs() / own.norm()) == pytest.approx(1, abs=1e-3)


def read_start(module) -> str:
    return module.adapter.to_dict()["start"]


def test_both_go_together_and_a_gradient_start_learns_faster(fit) -> None:
    usual = fit(AUTO, max_epochs=2)
    along = fit(AUTO | {"start": "gradient"}, max_epochs=2)
    assert along[0].adapter.filters == usual[0].adapter.filters
    assert along[1][1] == usual[1][1]  # the first step sees the frozen model
    assert along[1] != usual[1]
    assert min(along[1].values()) < min(usual[1].values())


def test_a_resumed_run_takes_the_checkpoints_choice(fit, make_data, tmp_path, monkeypatch) -> None:
    saving = ModelCheckpoint(
        dirpath=tmp_path,
        save_top_k=-1,
        filename="{step}",
        auto_insert_metric_name=False,
        every_n_train_steps=1,
    )
    adapter = AUTO | {"start": "gradient"}
    whole, losses, _, state = fit(adapter, saving, max_epochs=2)
    told = []
    resolve = auto_filters.resolve_filters

    def other(model, config, trainer):
        told.append(1)
        resolved = resolve(model, config, trainer)
        filters = {name: [[4, 4, 8, 8]] * 3 for name in resolved.config.filters}
        return resolved._replace(config=replace(resolved.config, filters=filters), left_factors={})

    monkeypatch.setattr(auto_filters, "resolve_filters", other)
    resumed = fit(adapter, ckpt_path=tmp_path / "3.ckpt", max_epochs=2)
    assert resumed[0].adapter == whole.adapter
    assert resumed[1] == {step: loss for step, loss in losses.items() if step > 3}
    assert all(torch.equal(resumed[3][name], tensor) for name, tensor in state.items())
    # With a word that it resumes, nothing is chosen in vain.
    assert told == [1]
    module = whole.__class__(whole.backbone, MokaConfig(**adapter), optimizer=whole.optimizer)
    module.resumes = True
    again = fit(adapter, ckpt_path=tmp_path / "3.ckpt", max_epochs=2, module=module)
    assert told == [1]
    assert again[0].adapter == whole.adapter
    assert again[1] == resumed[1]


def test_evaluations_and_the_saved_adapter_need_no_training_data(
    fit, make_data, make_module, make_trainer, tmp_path, monkeypatch
) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True, enable_version_counter=False)
    module, *_ = fit(AUTO, AdapterCheckpoint(dirpath=str(tmp_path / "adapters")), saving)
    stored = read_adapter(tmp_path / "adapters" / "last").config
    assert stored == module.adapter
    expected = module.eval_values["val/loss"]
    monkeypatch.setattr(auto_filters, "first_batches", lambda *_: pytest.fail("data were asked for"))
    loaded = make_module(adapter_path=str(tmp_path / "adapters" / "last"))
    make_trainer().validate(loaded, make_data(), verbose=False)
    assert loaded.eval_values["val/loss"] == expected
    loaded = make_module(adapter=AUTO)
    make_trainer().validate(loaded, make_data(), verbose=False)
    frozen = loaded.eval_values["val/loss"]
    assert frozen != expected
    make_trainer().validate(
        loaded, make_data(), ckpt_path=tmp_path / "last.ckpt", verbose=False, weights_only=True
    )
    assert loaded.eval_values["val/loss"] == expected
    assert loaded.adapter == module.adapter


def test_a_fit_after_a_validation_still_chooses(make_module, make_data, make_trainer) -> None:
    module = make_module(adapter=AUTO)
    make_trainer().validate(module, make_data(), verbose=False)
    assert module.adapter.filters == "auto"
    make_trainer(max_steps=2).fit(module, make_data())
    assert module.adapter.filters == listed(module)
    assert {name for name, p in module.named_parameters() if p.requires_grad}.isdisjoint(
        module._ddp_params_and_buffers_to_ignore
    )


def test_a_checkpoint_of_other_filters_is_refused(fit, tmp_path) -> None:
    saving = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    fit({"components": 3}, saving, max_steps=1)
    with pytest.raises(AdapterError, match=r"adapter\.filters is 'diverse', this model's is listed by layer"):
        fit(AUTO, ckpt_path=tmp_path / "last.ckpt")


@pytest.mark.parametrize(
    ("adapter", "words"),
    [({"filters": "auto"}, "filters: auto needs"), ({"start": "gradient"}, "start: gradient needs")],
)
def test_without_a_trainer_it_says_what_to_do(make_module, adapter, words) -> None:
    with pytest.raises(ConfigError, match=rf"{words} the training data.*choose_filters"):
        make_module(adapter=adapter).configure_model()


def test_a_model_alone_takes_no_auto(tiny_llama) -> None:
    with pytest.raises(ConfigError, match=r"filters: auto needs a training run.*choose_filters"):
        inject_adapter(tiny_llama, MokaConfig(filters="auto"))


def test_too_small_a_budget_is_told(fit) -> None:
    with pytest.raises(ConfigError, match="too small for 3 components"):
        fit(AUTO | {"budget": 10})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": 100}, r"budget \(100\) works only with filters: auto"),
        ({"filters": "auto", "budget": 0}, "at least 1, not 0"),
        ({"start": "warm"}, "'warm'; choose one of zero, zero_left, gradient"),
        ({"start": "gradient", "filters": "prime"}, "identities; set start: zero"),
        ({"filters": "auto", "components": 0}, "at least 1, not 0"),
    ],
)
def test_options_that_cannot_work_are_refused(options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        MokaConfig(**options)


def test_layers_share_a_budget_as_diverse_does(tiny_llama) -> None:
    names = ["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj"]
    usual = layer_budgets(tiny_llama, names, 4)
    assert Counter(layer_budgets(tiny_llama, names, 4, 2 * sum(usual.values()))) == Counter(
        {name: 2 * entries for name, entries in usual.items()}
    )


def test_the_command_line_knows_the_options(build_cli) -> None:
    options = (
        "--model.adapter.filters",
        "auto",
        "--model.adapter.budget",
        9000,
        "--model.adapter.start",
        "gradient",
    )
    built = build_cli("fit", "--config", "configs/smollm2.yaml", *options).model.adapter
    assert (built.filters, built.budget, built.start) == ("auto", 9000, "gradient")
