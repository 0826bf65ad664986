"""What a resumed run may change: every option is of one of three kinds."""

from fnmatch import fnmatchcase

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, StepLR
from torch.utils.data import DataLoader

from moka_pl.backbone import BackboneConfig
from moka_pl.errors import ConfigError
from moka_pl.training.course import (
    CONSEQUENCES,
    changed_course,
    check_changes,
    course_of,
    only_held_out,
    optimizer_course,
)
from moka_pl.training.learning_rates import LearningRateRatios
from moka_pl.training.schedule import WarmupDecay
from moka_pl.training.trial_optimizer import build_trial

FREE, NEVER = "free", "never"
"""May change as one likes; is refused, whatever is allowed."""

#: The kind of every option of ``fit``: free, never, or the change that lets it differ.
KINDS = {
    # Checkpoints, logs and what is shown
    "adapters.*": FREE,
    "checkpoint.*": FREE,
    "gates.*": FREE,
    "example.*": FREE,
    "base_scores.*": FREE,
    "ckpt_path": FREE,
    "config": FREE,
    "weights_only": FREE,
    # Data: rows count by their content, and their source only for what cannot be read whole
    "data.class_path": "data",
    "data.init_args.batch_size": "batch_size",
    "data.init_args.max_tokens": "batch_size",
    "data.init_args.seed": "seed",
    "seed_everything": "seed",  # all other generators are restored
    "data.init_args.eval_batch_size": FREE,
    "data.init_args.generated_tokens": FREE,
    "data.init_args.num_proc": FREE,
    "data.init_args.num_workers": FREE,  # but not where data are streamed
    "data.init_args.share_prefix": FREE,
    "data.init_args.scoring": FREE,
    "data.init_args.shots": FREE,
    "data.init_args.stride": FREE,
    "data.init_args.subjects": FREE,  # evaluated only
    "data.init_args.validation_*": FREE,  # at the end of an epoch; within one it is another order
    "data.init_args.separate_test": FREE,
    "data.init_args.*": "data",
    # The base and the adapter
    "model.backbone.name": NEVER,  # unless it is the same base by another name
    "model.backbone.revision": NEVER,
    "model.backbone.weights": NEVER,
    "model.backbone.seed": NEVER,
    "model.backbone.new_tokens": NEVER,
    "model.backbone.quantization": "quantization",
    "model.backbone.double_quantization": "quantization",
    "model.backbone.compute_dtype": "precision",
    "model.backbone.matmul": "precision",
    "model.backbone.attention": FREE,
    "model.backbone.kernels": FREE,
    "model.backbone.compile": FREE,
    "model.backbone.cache_dir": FREE,
    "model.adapter.class_path": NEVER,
    "model.adapter.init_args.components": NEVER,
    "model.adapter.init_args.rank": NEVER,
    "model.adapter.init_args.filters": NEVER,
    "model.adapter.init_args.gating": NEVER,
    "model.adapter.init_args.target_modules": NEVER,
    "model.adapter.init_args.exclude_modules": NEVER,
    "model.adapter.init_args.ensure_weight_tying": NEVER,
    "model.adapter.init_args.trainable_token_indices": NEVER,
    "model.adapter.init_args.modules_to_save": NEVER,
    "model.adapter.init_args.scaling": "adapter",
    "model.adapter.init_args.dropout": "adapter",
    "model.adapter.init_args.backend": FREE,
    "model.adapter.init_args.budget": FREE,  # of a choice that has been made
    "model.adapter.init_args.start": FREE,
    "model.adapter_path": FREE,  # its tensors are replaced
    "model.allow_changes": FREE,
    "model.cuda_graphs": FREE,
    "model.gradient_checkpointing": FREE,
    "model.halve_micro_batches": FREE,
    "model.loss_spikes.*": FREE,
    "model.max_non_finite_steps": FREE,
    # The optimizer
    "model.learning_rate_ratios.*": "learning_rate",
    "model.optimizer.init_args.lr": "learning_rate",
    **{f"model.optimizer.init_args.{n}": FREE for n in ("capturable", "differentiable", "foreach", "fused")},
    "model.optimizer.*": "optimizer",
    "model.lr_scheduler.*": "scheduler",
    # The trainer
    "trainer.accelerator": FREE,  # another dtype is another precision
    "trainer.accumulate_grad_batches": "accumulation",
    "trainer.devices": "ranks",
    "trainer.num_nodes": "ranks",
    "trainer.gradient_clip_*": "clipping",
    "trainer.limit_train_batches": "data",
    "trainer.overfit_batches": "data",
    "trainer.precision": "precision",
    "trainer.logger*": FREE,
    "trainer.max_*": FREE,  # longer runs; a schedule stretches with them, and says so
    "trainer.min_*": FREE,
    "trainer.callbacks": FREE,
    "trainer.plugins": FREE,
    "trainer.strategy": FREE,
    "trainer.reload_dataloaders_every_n_epochs": FREE,
    "trainer.use_distributed_sampler": FREE,  # the samplers here are distributed already
    "trainer.sync_batchnorm": FREE,
    **{
        f"trainer.{name}": FREE
        for name in (
            *("barebones", "benchmark", "check_val_every_n_epoch", "default_root_dir", "detect_anomaly"),
            *("deterministic", "enable_*", "fast_dev_run", "inference_mode", "limit_predict_batches"),
            *("limit_test_batches", "limit_val_batches", "log_every_n_steps", "model_registry"),
            *("num_sanity_val_steps", "profiler", "val_check_interval"),
        )
    },
}


def kind(option):
    """The first pattern that fits; exact names stand before the patterns that would cover them."""
    return next((found for pattern, found in KINDS.items() if fnmatchcase(option, pattern)), None)


@pytest.mark.parametrize(
    "data",
    ["Instruction", *(pytest.param(n, marks=pytest.mark.slow) for n in ("Commonsense", "Mmlu", "Text"))],
)
def test_every_option_is_of_a_kind(build_cli, data):
    cli = build_cli("fit", "--data", f"{data}Data", "--data.init_args.path", "x.jsonl")
    options = list(cli.config["fit"].keys())
    assert len(options) > 100
    unknown = [option for option in options if kind(option) is None]
    assert not unknown, "say in KINDS whether a resumed run may change them"
    assert set(KINDS.values()) == {FREE, NEVER, *CONSEQUENCES}


# What is recorded


def course(make_module, make_trainer, trainer=(), callbacks=(), **module):
    module = make_module(**module)
    return course_of(module, make_trainer(*callbacks, **dict(trainer))) | optimizer_course(
        *build_trial(module)
    )


def adam(**options):
    return lambda parameters: torch.optim.AdamW(parameters, **({"lr": 0.1} | options))


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


@pytest.mark.parametrize(
    ("options", "change", "found"),
    [
        ({"optimizer": adam(lr=0.2)}, "learning_rate", {"lr": (0.1, 0.2)}),
        ({"optimizer": adam(weight_decay=0.5)}, "optimizer", {"weight_decay": (0.01, 0.5)}),
        ({"optimizer": adam(betas=(0.8, 0.9))}, "optimizer", {"betas": ([0.9, 0.999], [0.8, 0.9])}),
        ({"optimizer": adam(foreach=False)}, None, None),
        ({"optimizer": sgd}, "optimizer", {"class": ("torch.AdamW", "torch.SGD")}),
        (
            {"lr_scheduler": lambda o: StepLR(o, 3)},
            "scheduler",
            {"class": ("moka_pl.WarmupDecay", "torch.StepLR")},
        ),
        ({"lr_scheduler": lambda o: WarmupDecay(o, warmup=7)}, "scheduler", {"warmup": (0.03, 7)}),
        ({"trainer": {"accumulate_grad_batches": 3}}, "accumulation", {"accumulate_grad_batches": (1, 3)}),
        (
            {"callbacks": [GradientAccumulationScheduler({2: 4})]},
            "accumulation",
            {"accumulate_grad_batches": (1, "{2: 4, 0: 1}")},
        ),
        ({"trainer": {"precision": "bf16-mixed"}}, "precision", {"precision": ("32-true", "bf16-mixed")}),
        ({"trainer": {"limit_train_batches": 5}}, "data", {"limit_train_batches": (1.0, 5)}),
        (
            {"trainer": {"gradient_clip_val": 1.0}},
            "clipping",
            {"gradient_clip_val": (None, 1.0), "gradient_clip_algorithm": (None, "norm")},
        ),
        (
            {"backbone": BackboneConfig("tiny", weights="random", quantization="fp4")},
            "quantization",
            {"quantization": ("nf4", "fp4")},
        ),
        (
            {"backbone": BackboneConfig("tiny", weights="random", compute_dtype="bfloat16")},
            "precision",
            {"compute_dtype": ("float32", "bfloat16")},
        ),
        (
            {"backbone": BackboneConfig("tiny", weights="random", matmul="fp8")},
            "precision",
            {"matmul": ("bf16", "fp8")},
        ),
        ({"trainer": {"max_epochs": 9, "log_every_n_steps": 3}}, None, None),
    ],
)
def test_changes_are_named_with_both_values(make_module, make_trainer, options, change, found):
    stored = course(make_module, make_trainer, optimizer=adam())
    current = course(make_module, make_trainer, **({"optimizer": adam()} | options))
    assert changed_course(stored, current) == ({} if change is None else {change: found})
    if change is not None:
        with pytest.raises(ConfigError, match=rf"\({change}: .*allow_changes '\[{change}\]'"):
            check_changes({change: found}, {"seed"})
        check_changes({change: found}, {change})


def test_schedulers_with_options_in_the_optimizer(make_module, make_trainer):
    def one_cycle(highest):
        return {"lr_scheduler": lambda o: OneCycleLR(o, highest, total_steps=9)}

    stored = course(make_module, make_trainer, **one_cycle(0.1))
    changed = changed_course(stored, course(make_module, make_trainer, **one_cycle(0.2)))
    assert changed["scheduler"]["max_lr"] == (0.1, 0.2)


def test_unknown_changes_are_refused(make_module):
    with pytest.raises(ConfigError, match="unknown name 'dta'; choose from data, batch_size"):
        make_module(allow_changes=["dta"])


def test_what_is_held_out_is_no_other_source():
    assert only_held_out({"data": {"rows": (19, 24), "data": ("a", "b")}})
    assert not only_held_out({"data": {"rows": (19, 24), "source": ("a", "b")}})


# Going on with a change


class Seen(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        labels = zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True)
        self.rows += [tuple(t for t in ids if t) for ids, row in labels if any(x != -100 for x in row)]


@pytest.fixture
def half(make_module, make_data, make_trainer, tmp_path):
    """A checkpoint after three of seven batches; options go to the module."""

    def run(**options):
        saving = ModelCheckpoint(tmp_path, filename="half", every_n_train_steps=3)
        length = {"max_steps": 3, "max_epochs": -1, "limit_val_batches": 0, "enable_checkpointing": True}
        make_trainer(saving, **length).fit(make_module(**options), make_data())
        return tmp_path / "half.ckpt"

    return run


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_with_other_batches_the_epoch_begins_anew(half, make_module, make_data, make_trainer):
    path = half()
    options = {"ckpt_path": path, "weights_only": True}
    with pytest.raises(ConfigError, match="batch_size: batch_size 2, now 3"):
        make_trainer().fit(make_module(), make_data(batch_size=3), **options)
    seen = Seen()
    trainer = make_trainer(seen, max_epochs=2, limit_val_batches=0)
    trainer.fit(make_module(allow_changes=["batch_size"]), make_data(batch_size=3), **options)
    assert len(seen.rows) == 2 * 13
    assert len(set(seen.rows[:13])) == len(set(seen.rows[13:])) == 13
    assert trainer.global_step == 3 + 2 * 5
    assert trainer.current_epoch == 2


def rates_of(make_module, make_data, make_trainer, log, path=None, **options):
    steps = log()
    trainer = make_trainer(steps, max_epochs=1, limit_val_batches=0)
    module = make_module(**options)
    trainer.fit(module, make_data(), ckpt_path=path, weights_only=True)
    return steps.rates, trainer


def cosine(optimizer):  # each of its rates follows from the one before
    return CosineAnnealingLR(optimizer, T_max=20)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("before", "after", "allowed"),
    [
        ({"lr": 0.01}, {"lr": 0.02}, ["learning_rate"]),
        ({"lr": 0.01, "lr_scheduler": cosine}, {"lr": 0.02, "lr_scheduler": cosine}, ["learning_rate"]),
        ({"lr_scheduler": cosine}, {"lr_scheduler": lambda o: WarmupDecay(o, warmup=5)}, ["scheduler"]),
        ({}, {"lr_scheduler": cosine}, ["scheduler"]),
        ({}, {"learning_rate_ratios": LearningRateRatios(gate=0.5)}, ["learning_rate"]),
        (
            {"optimizer": adam(), "lr_scheduler": cosine},
            {"optimizer": sgd, "lr_scheduler": cosine},
            ["optimizer"],
        ),
    ],
    ids=["rate", "rate_of_cosine", "to_warmup", "to_cosine", "ratios", "class"],
)
def test_an_allowed_change_takes_effect_from_here(
    half, make_module, make_data, make_trainer, step_log, before, after, allowed
):
    path = half(**before)
    makers = (make_module, make_data, make_trainer, step_log)
    whole, _ = rates_of(*makers, **after)
    rates, trainer = rates_of(*makers, path, allow_changes=allowed, **after)
    assert rates == pytest.approx({step: rate for step, rate in whole.items() if step > 3})
    [optimizer] = trainer.optimizers
    if after.get("optimizer") is sgd:
        assert type(optimizer) is torch.optim.SGD
    elif "learning_rate_ratios" not in after:
        steps = {int(state["step"]) for state in optimizer.state.values()}
        assert steps == {7}  # its moments were kept


def test_plain_loaders_have_no_order(make_module, make_trainer):
    trainer = make_trainer()
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert DataLoader([1]).dataset == [1]
    assert course_of(make_module(), trainer)["batch_size"] == {}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Be aware", "ignore:Checkpoint directory")
def test_what_evaluations_and_older_checkpoints_are_told(
    half, make_module, make_data, make_trainer, caplog, tmp_path
):
    path = half()
    options = {"ckpt_path": path, "weights_only": True}
    quiet = options | {"verbose": False}
    with pytest.warns(UserWarning, match="was trained with the prompt 'alpaca', these data have 'chat'"):
        make_trainer().validate(make_module(lr=5.0), make_data(prompt="chat", batch_size=3), **quiet)
    with pytest.raises(ConfigError, match=r"adapter: scaling 3.0, now 1.0"):
        make_trainer().validate(make_module(adapter={"scaling": 1.0}), make_data(), **quiet)
    make_trainer().validate(make_module(adapter={"scaling": 3.0, "dropout": 0.5}), make_data(), **quiet)

    content = torch.load(path, weights_only=True)
    torch.save({k: v for k, v in content.items() if k != "optimizer_states"}, path)
    with pytest.raises(ConfigError, match="holds weights only"):
        make_trainer().fit(make_module(), make_data(), **options)
    torch.save({k: v for k, v in content.items() if k != "moka_course"}, path)
    with caplog.at_level("INFO"):
        make_trainer(max_steps=4, max_epochs=-1, limit_val_batches=0).fit(
            make_module(), make_data(), **options
        )
    assert "the checkpoint is of an earlier version of moka_pl" in caplog.text
