"""Two processes skip a step together. Run as a script, this file is what each of the two does."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import DDPStrategy
from shared.environment import own_environment

from moka_pl.adapters import MokaConfig
from moka_pl.backbone import BackboneConfig
from moka_pl.callbacks import AdapterCheckpoint, GracefulInterrupt
from moka_pl.data import InstructionData
from moka_pl.errors import NonFiniteError
from moka_pl.training.module import MokaModule


class SpoilOneRank(Callback):
    """Makes the loss of the second rank infinite in steps 2, 4 and 5; keeps the weights of every step."""

    def __init__(self):
        self.on, self.sums = False, []

    def on_train_start(self, trainer, pl_module):
        layer = pl_module.model.get_submodule("model.layers.1.mlp.down_proj")
        layer.register_forward_hook(lambda module, args, out: out * math.inf if self.on else None)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.on = trainer.global_rank == 1 and batch_idx + 1 in (2, 4, 5)

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.sums.append(sum(float(p.double().sum()) for p in pl_module.parameters() if p.requires_grad))

    def on_exception(self, trainer, pl_module, exception):
        self.on_train_batch_end(trainer, pl_module)  # the step that ended the run


def train(folder):
    torch.manual_seed(3)
    module = MokaModule(
        BackboneConfig(name="tiny", weights="random"), MokaConfig(components=3), max_non_finite_steps=2
    )
    spoil = SpoilOneRank()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=DDPStrategy(process_group_backend="gloo"),
        max_epochs=1,
        limit_val_batches=0,
        logger=False,
        default_root_dir=folder,
        callbacks=[spoil, AdapterCheckpoint(), GracefulInterrupt()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(module, InstructionData(folder / "train.jsonl", prompt="alpaca", batch_size=1))
    except NonFiniteError as error:
        record = {"sums": spoil.sums, "skipped": module._non_finite.numbers, "error": str(error)}
        (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(record))


@pytest.mark.slow
def test_both_skip_what_is_not_finite_on_one(tmp_path):
    rows = [{"instruction": f"{n}?", "output": f"answer {n}"} for n in range(16)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = own_environment(tmp_path / "cache")
    command = [sys.executable, __file__, str(tmp_path)]
    run = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=environment,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["skipped"] == [2, 4, 5]
    sums = first["sums"]
    assert sums[0] == sums[1] != sums[2] == sums[3] == sums[4]
    assert "the last 2 steps (4 to 5)" in first["error"]
    assert "is not finite: model.layers.1.mlp.down_proj; rows: " in run.stderr
    assert "(rank 1)" in run.stderr
    assert "(rank 0)" not in run.stderr
    saved = tmp_path / "adapters" / "last" / "adapter_config.json"
    assert not saved.exists() or json.loads(saved.read_text())["extra"]["step"] == 5


if __name__ == "__main__":
    train(Path(sys.argv[1]))
