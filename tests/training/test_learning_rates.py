"""Learning rates of left factors, right factors and gates."""

import csv
import math
from dataclasses import asdict

import peft
import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import ReduceLROnPlateau
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.func import functional_call

from moka_pl.adapters import FullFineTuning, MokaConfig, MokaLinear, moka_layers
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.training.learning_rates import LearningRateRatios, make_optimizer
from moka_pl.training.module import MokaModule
from moka_pl.training.schedule import WarmupDecay

RATIOS = LearningRateRatios(left=0.5, right=4.0, gate=10.0)
PARTS = {"moka_A": "left", "moka_B": "right", "moka_gate": "gate"}


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.25)


def constant(optimizer):
    return WarmupDecay(optimizer, warmup=0, decay="constant")


def trainable(module):
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def part_of(name):
    return PARTS[name.rpartition(".")[2]]


class Rates(Callback):
    """Keeps the groups' rates and what is logged, before every optimizer step."""

    def __init__(self):
        self.seen = []

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.seen.append({group.get("name"): group["lr"] for group in optimizer.param_groups})


@pytest.mark.parametrize("ratio", [-1.0, math.nan, math.inf])
@pytest.mark.parametrize("part", ["left", "right", "gate"])
def test_ratios_that_cannot_work_are_refused(part, ratio) -> None:
    with pytest.raises(ConfigError, match=rf"learning_rate_ratios\.{part} must be 0 or more.*{ratio}"):
        LearningRateRatios(**{part: ratio})


def test_without_ratios_there_is_one_group_of_all_parameters_in_their_order(make_module) -> None:
    module = make_module()
    module.configure_model()
    optimizer = module.configure_optimizers()["optimizer"]
    (group,) = optimizer.param_groups
    assert "name" not in group
    assert [id(p) for p in group["params"]] == [id(p) for p in trainable(module).values()]


@pytest.mark.parametrize("optimizer", [sgd, lambda p: torch.optim.Adam(p, lr=torch.tensor(0.25))])
def test_every_part_has_a_group_with_its_rate(make_module, optimizer) -> None:
    module = make_module(learning_rate_ratios=RATIOS, optimizer=optimizer, lr_scheduler=constant)
    module.configure_model()
    groups = module.configure_optimizers()["optimizer"].param_groups
    names = {id(p): name for name, p in trainable(module).items()}
    assert sorted(id(p) for group in groups for p in group["params"]) == sorted(names)
    for group, (part, ratio) in zip(groups, asdict(RATIOS).items(), strict=True):
        assert group["name"] == part
        assert {part_of(names[id(p)]) for p in group["params"]} == {part}
        assert float(group["lr"]) == float(group["initial_lr"]) == 0.25 * ratio


def test_parts_that_an_adapter_lacks_have_no_group(make_module) -> None:
    module = make_module(
        learning_rate_ratios=RATIOS, optimizer=sgd, adapter={"gating": "none", "filters": "prime"}
    )
    module.configure_model()
    assert [g["name"] for g in module.configure_optimizers()["optimizer"].param_groups] == ["right"]


def one_step(make_module, make_data, make_trainer, randomize, ratios):
    """How far one step of plain gradient descent moves every parameter."""
    module = make_module(learning_rate_ratios=ratios, optimizer=sgd, lr_scheduler=constant)
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    module.configure_model()
    randomize(module)
    before = {name: p.detach().clone() for name, p in trainable(module).items()}
    trainer.fit(module, make_data())
    return {name: p.detach() - before[name] for name, p in trainable(module).items()}


@pytest.mark.parametrize("ratios", [RATIOS, LearningRateRatios(left=0, right=2)])
def test_a_part_moves_as_many_times_as_far(make_module, make_data, make_trainer, randomize, ratios) -> None:
    plain = one_step(make_module, make_data, make_trainer, randomize, LearningRateRatios())
    found = one_step(make_module, make_data, make_trainer, randomize, ratios)
    for name, way in plain.items():
        assert way.abs().max() > 1e-4
        ratio = getattr(ratios, part_of(name))
        torch.testing.assert_close(found[name], ratio * way, rtol=1e-3, atol=1e-6)
        assert ratio or not found[name].any()  # 0: bit for bit where it was


def test_schedules_keep_their_form_and_every_rate_is_logged(
    make_module, make_data, make_trainer, tmp_path
) -> None:
    def scheduler(optimizer):
        return WarmupDecay(optimizer, warmup=2, decay="linear")

    def run(ratios):
        module = make_module(learning_rate_ratios=ratios, optimizer=sgd, lr_scheduler=scheduler)
        rates, logger = Rates(), CSVLogger(tmp_path, name=str(ratios.right))
        make_trainer(rates, logger=logger, max_steps=5, limit_val_batches=0).fit(module, make_data())
        with (tmp_path / str(ratios.right) / "version_0" / "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
        return rates.seen, [{k: float(v) for k, v in row.items() if k.startswith("train/lr")} for row in rows]

    plain, told = run(LearningRateRatios())
    base = [group[None] for group in plain]
    assert len(set(base)) > 3
    assert told == [{"train/lr": pytest.approx(rate)} for rate in base]
    found, told = run(RATIOS)
    assert found == [
        {part: pytest.approx(ratio * rate) for part, ratio in asdict(RATIOS).items()} for rate in base
    ]
    for row, rate, group in zip(told, base, found, strict=True):
        assert row == pytest.approx({"train/lr": rate} | {f"train/lr_{k}": v for k, v in group.items()})


def test_the_plain_rate_is_logged_where_a_part_has_none(make_module, make_data, make_trainer) -> None:
    trainer = make_trainer(max_steps=1, limit_val_batches=0)
    ratios = LearningRateRatios(left=0, right=2)
    module = make_module(learning_rate_ratios=ratios, optimizer=sgd, lr_scheduler=constant)
    trainer.fit(module, make_data())
    found = {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("train/lr")}
    assert found == {"train/lr": 0.25, "train/lr_left": 0, "train/lr_right": 0.5, "train/lr_gate": 0.25}


def test_a_plateau_scheduler_divides_all_rates(make_module, make_data, make_trainer) -> None:
    module = make_module(
        learning_rate_ratios=RATIOS,
        optimizer=sgd,
        lr_scheduler=lambda o: ReduceLROnPlateau(o, monitor="val/loss", mode="max", patience=0, factor=0.5),
    )
    trainer = make_trainer(max_epochs=3, limit_train_batches=1)
    trainer.fit(module, make_data())
    rates = {group["name"]: group["lr"] for group in trainer.optimizers[0].param_groups}
    assert rates["right"] < 1
    assert rates == {"left": rates["right"] / 8, "right": rates["right"], "gate": rates["right"] * 2.5}


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, 10),
        lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.2, cycle_momentum=False),
    ],
)
def test_a_scheduler_with_rates_of_its_own_is_refused(make_module, scheduler) -> None:
    module = make_module(learning_rate_ratios=RATIOS, optimizer=sgd, lr_scheduler=scheduler)
    module.configure_model()
    with pytest.raises(ConfigError, match=r"(OneCycle|Cyclic)LR sets its own learning rates"):
        module.configure_optimizers()
    module = make_module(optimizer=sgd, lr_scheduler=scheduler)
    module.configure_model()
    assert module.configure_optimizers()["lr_scheduler"]["scheduler"]  # without ratios it is no matter


def test_a_schedule_with_a_minimum_is_refused(make_module) -> None:
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR
    module = make_module(
        learning_rate_ratios=RATIOS, optimizer=sgd, lr_scheduler=lambda o: scheduler(o, 10, eta_min=1e-5)
    )
    module.configure_model()
    with pytest.raises(ConfigError, match="eta_min 1e-05 overrides learning_rate_ratios"):
        module.configure_optimizers()
    module = make_module(learning_rate_ratios=RATIOS, optimizer=sgd, lr_scheduler=lambda o: scheduler(o, 10))
    module.configure_model()
    assert module.configure_optimizers()["lr_scheduler"]["scheduler"]


def test_optimizers_without_groups_or_rates_are_refused() -> None:
    layer = MokaLinear(nn.Linear(6, 6).requires_grad_(False), MokaConfig(components=2))
    parameters = list(trainable(layer).items())
    with pytest.raises(ConfigError, match=r"rejects the parameter groups of learning_rate_ratios: LBFGS"):
        make_optimizer(torch.optim.LBFGS, parameters, RATIOS)

    class OwnRate(torch.optim.SGD):
        def __init__(self, groups) -> None:
            super().__init__(groups)
            for group in self.param_groups:
                group["lr"] = None

    with pytest.raises(ConfigError, match="OwnRate has no lr"):
        make_optimizer(OwnRate, parameters, RATIOS)


@pytest.mark.parametrize("adapter", [FullFineTuning(), peft.LoraConfig()], ids=lambda a: type(a).__name__)
def test_adapters_without_such_parts_are_refused_at_once(adapter) -> None:
    with pytest.raises(ConfigError, match=f"not to {type(adapter).__name__}"):
        MokaModule(adapter=adapter, learning_rate_ratios=LearningRateRatios(right=2))
    MokaModule(adapter=adapter, learning_rate_ratios=LearningRateRatios())


@pytest.mark.parametrize("gating", ["softmax", "sigmoid"])
def test_to_adam_a_temperature_is_a_rate_of_the_gates(gating) -> None:
    tau, steps, eps = 0.25, 25, 1e-9
    x, target = torch.randn(2, 30, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def start() -> MokaLinear:
        torch.manual_seed(1)
        base = nn.Linear(12, 12, dtype=torch.float64).requires_grad_(False)
        return MokaLinear(base, MokaConfig(components=4, gating=gating), torch.float64)

    def adam(groups, eps=eps):
        return torch.optim.Adam(groups, lr=5e-2, eps=eps)

    ours = start()
    optimizer = make_optimizer(adam, trainable(ours).items(), LearningRateRatios(gate=1 / tau))
    theirs = start()
    logits = theirs.moka_gate
    # These gradients are 1/τ times as large, and so is eps beside them.
    groups = [{"params": [logits], "eps": eps / tau}, {"params": [theirs.moka_A, theirs.moka_B]}]
    other = adam(groups)
    alphas = []
    for _ in range(steps):
        optimizer.zero_grad()
        (ours(x) - target).square().mean().backward()
        optimizer.step()
        other.zero_grad()
        (functional_call(theirs, {"moka_gate": logits / tau}, x) - target).square().mean().backward()
        other.step()
        alphas.append(ours.gates().detach())
        torch.testing.assert_close(ours.moka_gate, logits / tau, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(ours.moka_A, theirs.moka_A, rtol=1e-8, atol=1e-10)
        torch.testing.assert_close(ours.moka_B, theirs.moka_B, rtol=1e-8, atol=1e-10)
    assert (alphas[-1] - alphas[0]).abs().max() > 0.02  # the gates have moved


@pytest.fixture
def checkpoint(make_module, make_data, make_trainer, tmp_path):
    """Writes a checkpoint after two of four steps; returns the final parameters of the whole run, too."""

    def write(**options):
        module = make_module(**options)
        half = make_trainer(max_epochs=1, limit_train_batches=2, limit_val_batches=0)
        half.fit(module, make_data())
        half.save_checkpoint(tmp_path / "half.ckpt")
        return tmp_path / "half.ckpt"

    return write


def resume(make_module, make_data, make_trainer, path, **options):
    module = make_module(**options)
    trainer = make_trainer(max_epochs=2, limit_train_batches=2, limit_val_batches=0)
    trainer.fit(module, make_data(), ckpt_path=path, weights_only=True)
    return module


def test_a_run_with_ratios_resumes(checkpoint, make_module, make_data, make_trainer) -> None:
    options = {"learning_rate_ratios": RATIOS, "lr_scheduler": constant}
    path = checkpoint(**options)
    found = trainable(resume(make_module, make_data, make_trainer, path, **options))
    whole = make_module(**options)
    make_trainer(max_epochs=2, limit_train_batches=2, limit_val_batches=0).fit(whole, make_data())
    for name, parameter in trainable(whole).items():
        assert torch.equal(found[name], parameter), name


def test_other_ratios_are_refused_in_training_only(checkpoint, make_module, make_data, make_trainer) -> None:
    path = checkpoint(learning_rate_ratios=RATIOS)
    message = r"learning_rate_ratios\.left 0\.5, but this run has 1"
    with pytest.raises(AdapterError, match=message):
        resume(make_module, make_data, make_trainer, path)
    assert make_trainer().validate(make_module(), make_data(), ckpt_path=path, weights_only=True)


def test_a_checkpoint_from_before_there_were_ratios(checkpoint, make_module, make_data, make_trainer) -> None:
    path = checkpoint()
    content = torch.load(path, weights_only=True)
    del content["moka_learning_rate_ratios"]
    torch.save(content, path)
    module = resume(make_module, make_data, make_trainer, path)
    assert all(layer.moka_B.any() for layer in moka_layers(module).values())
    with pytest.raises(AdapterError, match=r"ratios\.left 1, but this run has 0\.5"):
        resume(make_module, make_data, make_trainer, path, learning_rate_ratios=RATIOS)


def test_on_the_command_line(build_cli) -> None:
    arguments = ["fit", "--data", "moka_pl.data.InstructionData", "--data.path", "x.jsonl"]
    plain = build_cli(*arguments).model.learning_rate_ratios
    assert plain == LearningRateRatios()
    found = build_cli(*arguments, "--model.learning_rate_ratios.right", "4").model.learning_rate_ratios
    assert found == LearningRateRatios(right=4)
