"""A lack of memory in training: one line, and a checkpoint of the last step; micro-batches in parts."""

import os
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy, SingleDeviceStrategy

from moka_pl.adapters import FullFineTuning, MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, GracefulInterrupt
from moka_pl.errors import ConfigError
from moka_pl.lm.scoring import TokenScores
from moka_pl.training.accidents.memory import StepMemoryError, check_halving, remedies
from moka_pl.training.accidents.micro_batches import MicroBatches
from moka_pl.training.sharding.strategy import ShardedStrategy

LAYER = "model.layers.1.mlp.down_proj"


class Memory(Callback):
    """Holds so many rows at a time, in the forward or the backward pass, from a micro-batch on."""

    def __init__(self, most, where="forward", begin=0):
        self.most, self.where, self.begin, self.count = most, where, begin, -1
        self.sizes = []

    def on_train_start(self, trainer, pl_module):
        pl_module.model.get_submodule(LAYER).register_forward_hook(self.look)
        if self.where == "optimizer":
            trainer.optimizers[0].register_step_post_hook(lambda *_: self.fill(99))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.count += 1

    def look(self, module, args, out):
        rows = len(out)
        if not torch.is_grad_enabled():
            return
        self.sizes.append(rows)
        if self.where == "forward":
            self.fill(rows)
        elif self.where == "backward" and out.requires_grad:
            out.register_hook(lambda gradient: self.fill(rows))

    def fill(self, rows):
        if rows > self.most and self.count >= self.begin:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.00 GiB.")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Leaves out the search for garbage, which takes long in a process with as many objects as pytest's."""
    for module in ("evaluation.memory", "training.accidents.memory"):
        monkeypatch.setattr(f"moka_pl.{module}.garbage_collection_cuda", lambda: None)


def test_ends_with_one_line_and_goes_on_exactly_from_the_last_step(train, assert_continues, tmp_path, caplog):
    whole = train(max_epochs=1)
    with pytest.raises(StepMemoryError) as error, caplog.at_level("INFO"):
        train(Memory(1, "backward", begin=5), AdapterCheckpoint(), GracefulInterrupt(), max_epochs=1)
    said = str(error.value)
    assert said.startswith("out of memory in the backward pass of step 3, with a micro-batch of 2 x ")
    assert "Lower data.init_args.batch_size" in said
    assert "or set model.gradient_checkpointing: true" in said
    assert said.endswith("(CUDA out of memory. Tried to allocate 6.00 GiB.)")
    assert "\n" not in said
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert f"Ended after step 2; checkpoint saved in {path}. To resume" in caplog.text
    assert (tmp_path / "adapters" / "last").is_dir()
    assert_continues(train(ckpt_path=path, max_epochs=1), whole, 2)


@pytest.mark.slow
def test_weights_that_the_optimizer_has_begun_to_change_are_not_saved(train, tmp_path):
    with pytest.raises(StepMemoryError, match=r"the optimizer's step of step 3, .* which are not saved"):
        train(Memory(2, "optimizer", begin=4), AdapterCheckpoint(), GracefulInterrupt())
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "adapters").exists()


# What to lower


def run_of(strategy="auto", ranks=1, device="cuda", **options):
    """A module as far as its remedies are concerned."""
    defaults = {"gradient_checkpointing": False, "cuda_graphs": False, "halves_batches": False}
    return SimpleNamespace(
        device=torch.device(device),
        backbone=BackboneConfig("tiny", compile=options.pop("compile", "none")),
        adapter=options.pop("adapter", MokaConfig()),
        trainer=SimpleNamespace(
            strategy=strategy, world_size=ranks, datamodule=None, precision_plugin=SimpleNamespace()
        ),
        **(defaults | options),
    )


@pytest.mark.parametrize(
    ("run", "rows", "expected"),
    [
        (run_of(), 4, ["batch_size", "halve", "max_length", "checkpointing: true", "sharded_offload"]),
        (run_of(device="cpu"), 1, ["max_length", "checkpointing: true"]),
        (run_of(gradient_checkpointing=True), 1, ["max_length", "checkpointing: offload", "sharded_offload"]),
        (run_of(gradient_checkpointing="offload"), 1, ["max_length", "sharded_offload"]),
        (run_of(ShardedStrategy(offload=True), gradient_checkpointing="offload"), 1, ["max_length"]),
        (
            run_of(DDPStrategy(), 2, halves_batches=True),
            4,
            ["batch_size", "max_length", "checkpointing: true", "strategy sharded"],
        ),
        (
            run_of(ShardedStrategy(), 2, gradient_checkpointing=True),
            4,
            ["batch_size", "halve_micro_batches", "max_length", "checkpointing: offload", "sharded_offload"],
        ),
        (
            run_of(cuda_graphs=True),
            1,
            ["max_length", "cuda_graphs: false", "checkpointing", "sharded_offload"],
        ),
        (run_of(compile="layers", gradient_checkpointing=True), 1, ["max_length"]),
        (run_of(adapter=FullFineTuning(), gradient_checkpointing="offload"), 1, ["max_length"]),
    ],
)
def test_names_what_is_not_in_use(run, rows, expected):
    found = remedies(run, rows)
    assert len(found) == len(expected)
    assert all(part in one for part, one in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("options", "strategy", "said"),
    [
        ({"cuda_graphs": True}, "auto", "model.halve_micro_batches is true, but model.cuda_graphs is true"),
        ({}, "scaled", "looks for overflows before ranks add up"),
        ({}, "fsdp", "how FSDPStrategy averages gradients"),
    ],
)
def test_refuses_to_halve_where_it_cannot(make_module, make_trainer, monkeypatch, options, strategy, said):
    module = make_module(halve_micro_batches=True, **options)
    kinds = {"auto": SingleDeviceStrategy("cpu"), "scaled": ShardedStrategy(), "fsdp": FSDPStrategy()}
    plugin = SimpleNamespace(scaler=object()) if strategy == "scaled" else None
    module._trainer = SimpleNamespace(
        strategy=kinds[strategy], world_size=1 if strategy == "auto" else 2, precision_plugin=plugin
    )
    with pytest.raises(ConfigError, match=said):
        check_halving(module)


# Halving


class Gradients(Callback):
    """Keeps the gradient of every step."""

    def __init__(self):
        self.steps, self.losses, self.outputs = [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, *args):
        self.outputs.append(float(outputs["loss"]))
        if trainer.global_step > len(self.steps):
            self.steps.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])
            self.losses.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture
def no_group_left():
    """Leaves nothing of a process group of one behind."""
    before = dict(os.environ)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
        for name in os.environ.keys() - before.keys():
            del os.environ[name]


@pytest.fixture
def fit(make_module, make_data, make_trainer):
    def run(*callbacks, packing=False, halve=True, **options):
        kept, module = Gradients(), make_module(halve_micro_batches=halve)
        data = make_data(batch_size=4, packing=packing)
        options = {"max_steps": 2, "limit_val_batches": 0, "accumulate_grad_batches": 2} | options
        make_trainer(kept, *callbacks, **options).fit(module, data)
        return kept

    return run


@pytest.mark.parametrize(
    ("where", "packing"),
    [
        ("backward", False),
        pytest.param("forward", False, marks=pytest.mark.slow),
        pytest.param("backward", True, marks=pytest.mark.slow),
        pytest.param("offloaded", False, marks=pytest.mark.slow),
    ],
)
def test_parts_have_the_gradient_of_the_whole(fit, where, packing, recwarn, no_group_left):
    most = 1 if packing else 2
    options = {"gradient_clip_val": 0.5}
    if where == "offloaded":
        options["strategy"] = ShardedStrategy(offload=True)
    memory = Memory(most, "backward" if where == "offloaded" else where)
    parts = fit(memory, packing=packing, **options)
    said = [str(w.message) for w in recwarn if "out of memory" in str(w.message)]
    whole = fit(packing=packing, halve=False, gradient_clip_val=0.5)
    assert parts.losses == pytest.approx(whole.losses, rel=1e-6)
    assert parts.outputs == pytest.approx(whole.outputs, rel=1e-6)
    for one, other in zip(parts.steps, whole.steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert max(memory.sizes) > most
    assert len(said) == 1
    assert (
        f"what does not fit is computed {most} rows at a time from here on, with the same gradient" in said[0]
    )


def test_a_failed_part_leaves_no_trace_and_what_fits_is_remembered(tiny_llama, monkeypatch):
    linear = torch.nn.Linear(3, 1, bias=False)
    sizes = []

    def scores(batch):
        ids = batch["input_ids"]
        sizes.append(len(ids))
        noise = torch.rand(len(ids))  # as dropout draws
        if len(ids) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        nll = linear(ids.float())[:, 0] + 0 * noise
        return TokenScores(nll, nll)

    plugin = SimpleNamespace()
    trainer = SimpleNamespace(
        accumulate_grad_batches=1, precision_plugin=plugin, strategy=SimpleNamespace(model=None)
    )
    module = SimpleNamespace(
        parameters=linear.parameters, trainer=trainer, token_scores=scores, device=torch.device("cpu")
    )
    batches = MicroBatches(module)
    ids = torch.arange(15).view(5, 3)
    batch = {"input_ids": ids, "labels": ids}
    torch.manual_seed(0)
    with pytest.warns(
        UserWarning, match="micro-batch of 5 x 3 tokens; what does not fit is computed 2 rows at a time"
    ):
        total, tokens = batches.compute(batch, first=True)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    torch.rand(2), torch.rand(2), torch.rand(1)
    assert torch.equal(torch.get_rng_state(), after)
    batches.add_gradients()
    assert tokens == 5
    assert float(total) == pytest.approx(float(linear(ids.float()).detach().sum()))
    assert torch.equal(linear.weight.grad, ids.float().sum(0, keepdim=True))
    assert sizes == [5, 2, 2, 1]
    wider = {name: torch.zeros(4, 3, dtype=torch.long) for name in batch}
    sizes.clear()
    resumed = MicroBatches(module)
    resumed.load_state_dict(batches.state_dict())
    for computes in (batches, resumed):
        computes.compute(wider, first=True)
    assert sizes == [2, 2, 2, 2]


@pytest.mark.slow
def test_a_row_that_does_not_fit_alone_ends_the_run(fit):
    said = "out of memory in one row of step 1, with a micro-batch of 1 x .* Lower data.init_args.max_length"
    with pytest.raises(StepMemoryError, match=said) as error:
        fit(Memory(0))
    assert "batch_size" not in str(error.value)
