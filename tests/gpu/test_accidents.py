"""Memory that ends in a training step, and loss spikes, on a GPU."""

import json

import pytest
import torch
from lightning.pytorch import Callback

from moka_pl.callbacks import GracefulInterrupt
from moka_pl.training.accidents import spikes
from moka_pl.training.accidents.memory import StepMemoryError
from moka_pl.training.accidents.spikes import SpikeOptions

pytestmark = pytest.mark.gpu

#: So many that their activations, not the weights and the allocator's blocks, fill the memory.
ROWS = 1024


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, *args):
        self.values.append(float(trainer.callback_metrics["train/loss"]))


@pytest.fixture
def fit(make_module, make_data, make_trainer, tmp_path):
    """Trains two steps on all rows with at most some bytes of the GPU's memory; returns the losses."""
    path = tmp_path / "many.jsonl"
    rows = [{"instruction": f"{i} and so on " * 4, "output": f"answer {i} of many"} for i in range(ROWS)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))

    def run(limit, halve):
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
        losses = Losses()
        try:
            trainer = make_trainer(
                losses, GracefulInterrupt(), accelerator="gpu", max_epochs=2, limit_val_batches=0
            )
            data = make_data(path=path, batch_size=ROWS, bucket=False)
            trainer.fit(make_module(halve_micro_batches=halve), data)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return losses.values

    return run


def test_a_batch_that_does_not_fit_is_halved_or_ends_the_run(fit, recwarn):
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    whole = fit(total, halve=False)
    half = torch.cuda.max_memory_allocated() // 2
    with pytest.raises(StepMemoryError, match=rf"of step 1, with a micro-batch of {ROWS} x .*CUDA out of"):
        fit(half, halve=False)
    halved = fit(half, halve=True)
    assert any(f"out of memory with a micro-batch of {ROWS} x" in str(warning.message) for warning in recwarn)
    assert halved == pytest.approx(whole, rel=1e-3)


class Spike(Callback):
    """Multiplies the logits of a step; keeps the weights after every step."""

    def __init__(self, step):
        self.step, self.on, self.states = step, False, {}

    def on_train_start(self, trainer, pl_module):
        norm = pl_module.causal_lm.model.norm
        norm.register_forward_hook(lambda module, args, out: out * 100 if self.on else None)

    def on_train_batch_start(self, trainer, *args):
        self.on = trainer.global_step + 1 == self.step

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.states[trainer.global_step] = [
            p.detach().clone() for p in pl_module.parameters() if p.requires_grad
        ]


def same(one, other):
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("every", [0, 2])
def test_a_spike_is_named_and_undone(make_module, make_data, make_trainer, monkeypatch, every):
    monkeypatch.setattr(spikes, "_LEAST", 4)
    spike = Spike(7)
    module = make_module(loss_spikes=SpikeOptions(rollback_every=every))
    trainer = make_trainer(spike, accelerator="gpu", max_steps=9, max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="step 7: the loss of .* is a spike"):
        trainer.fit(module, make_data())
    assert module._spikes.numbers == [7]
    assert same(spike.states[7], spike.states[4]) == bool(every)
    assert not same(spike.states[8], spike.states[7])
