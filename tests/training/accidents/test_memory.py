"""A lack of memory in training: one line, and a checkpoint of the last step; micro-batches in parts."""

import pytest
import torch
from lightning.pytorch import Callback

from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, GracefulInterrupt
from moka_pl.errors import ConfigError
from moka_pl.training.accidents.memory import StepMemoryError, remedies
from moka_pl.training.module import MokaModule

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


@pytest.fixture(scope="module")
def made():
    return {}


@pytest.mark.parametrize(("where", "begin", "stopped"), [("forward", 5, 2), ("backward", 2, 1)])
def test_ends_with_one_line_and_goes_on_exactly_from_the_last_step(
    train, assert_continues, made, tmp_path, caplog, where, begin, stopped
):
    whole = made.setdefault("whole", None) or train()
    made["whole"] = whole
    with pytest.raises(StepMemoryError) as error, caplog.at_level("INFO"):
        train(Memory(1, where, begin), AdapterCheckpoint(), GracefulInterrupt())
    said = str(error.value)
    assert said.startswith(
        f"out of memory in the {where} pass of step {stopped + 1}, with a micro-batch of 2 x "
    )
    assert "Lower data.init_args.batch_size" in said
    assert "or set model.gradient_checkpointing: true" in said
    assert said.endswith("(CUDA out of memory. Tried to allocate 6.00 GiB.)")
    assert "\n" not in said
    path = tmp_path / "checkpoints" / "last.ckpt"
    assert f"Ended after step {stopped}; checkpoint saved in {path}. To resume" in caplog.text
    assert (tmp_path / "adapters" / "last").is_dir()
    assert_continues(train(ckpt_path=path), whole, stopped)


def test_weights_that_the_optimizer_has_begun_to_change_are_not_saved(train, tmp_path):
    with pytest.raises(StepMemoryError, match=r"the optimizer's step of step 3, .* which are not saved"):
        train(Memory(2, "optimizer", begin=4), AdapterCheckpoint(), GracefulInterrupt())
    assert not (tmp_path / "checkpoints").exists()
    assert not (tmp_path / "adapters").exists()


# Halving


class Gradients(Callback):
    """Keeps the gradient of every step."""

    def __init__(self):
        self.steps, self.losses = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        pass

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.steps):
            self.steps.append([p.grad.clone() for p in pl_module.parameters() if p.grad is not None])
            self.losses.append(trainer.callback_metrics["train/loss"])


def fit(make_module, make_data, make_trainer, *callbacks, packing=False, steps=3, **options):
    kept = Gradients()
    module = make_module(halve_micro_batches=options.pop("halve", True))
    data = make_data(batch_size=4, packing=packing)
    trainer = make_trainer(kept, *callbacks, max_steps=steps, limit_val_batches=0, **options)
    trainer.fit(module, data)
    return kept


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("packing", [False, True])
def test_parts_have_the_gradient_of_the_whole(make_module, make_data, make_trainer, where, packing, recwarn):
    memory = Memory(1 if packing else 2, where)
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}
    parts = fit(make_module, make_data, make_trainer, memory, packing=packing, **options)
    said = [str(w.message) for w in recwarn if "out of memory" in str(w.message)]
    whole = fit(make_module, make_data, make_trainer, packing=packing, halve=False, **options)
    assert max(memory.sizes) > memory.most
    torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-6, atol=0)
    for one, other in zip(parts.steps, whole.steps, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    assert said
