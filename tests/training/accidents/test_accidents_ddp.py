"""Two processes: memory that ends on one, a spike on one. Run as a script, this file is what each does."""

import json
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
from moka_pl.data import InstructionData
from moka_pl.training.accidents import spikes
from moka_pl.training.accidents.spikes import SpikeOptions
from moka_pl.training.module import MokaModule
from moka_pl.training.sharding.strategy import ShardedStrategy

STEPS, SPIKE = 9, 8
#: Losses after which one can be a spike.
FEWEST = 4


class Trouble(Callback):
    """On the second rank one row fits at a time, and a step's logits are multiplied; keeps what happens."""

    def __init__(self):
        self.on, self.losses, self.sums, self.sizes = False, [], [], set()

    def on_train_start(self, trainer, pl_module):
        model = pl_module.causal_lm.model
        model.norm.register_forward_hook(lambda module, args, out: out * 100 if self.on else None)
        model.layers[1].mlp.register_forward_hook(lambda module, args, out: self.look(trainer, len(out)))

    def look(self, trainer, rows):
        if torch.is_grad_enabled():
            self.sizes.add(rows)
            if rows > 1 and trainer.global_rank == 1:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.on = trainer.global_rank == 1 and trainer.global_step + 1 == SPIKE

    def on_train_batch_end(self, trainer, pl_module, *args):
        if trainer.global_step > len(self.sums):
            self.losses.append(float(trainer.callback_metrics["train/loss"]))
            self.sums.append(
                sum(float(p.detach().double().sum()) for p in pl_module.parameters() if p.requires_grad)
            )


def train(folder, devices=2, strategy=DDPStrategy):
    torch.manual_seed(3)
    module = MokaModule(
        BackboneConfig(name="tiny", weights="random"),
        MokaConfig(components=3),
        optimizer=lambda p: torch.optim.SGD(p, lr=1.0, momentum=0.9),  # linear in what is rounded
        loss_spikes=SpikeOptions(rollback_every=2 if devices == 2 else 0),
        halve_micro_batches=devices == 2,
    )
    trouble = Trouble()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy(process_group_backend="gloo") if devices == 2 else "auto",
        max_steps=STEPS,
        accumulate_grad_batches=2,
        limit_val_batches=0,
        logger=False,
        default_root_dir=folder,
        callbacks=[trouble],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(
        module,
        InstructionData(folder / "train.jsonl", prompt="alpaca", batch_size=4 // devices, bucket=False),
    )
    record = {"losses": trouble.losses, "sums": trouble.sums, "sizes": sorted(trouble.sizes)}
    (folder / f"{devices}_{trainer.global_rank}.json").write_text(json.dumps(record))
    return record


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "sharded"])
def test_ranks_halve_alone_and_go_back_together(strategy, tmp_path, one_thread, monkeypatch):
    monkeypatch.setattr(spikes, "_LEAST", FEWEST)
    rows = [{"instruction": f"{n}?", "output": f"answer {n} " * (1 + n % 3)} for n in range(80)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = own_environment(tmp_path / "cache")
    command = [sys.executable, __file__, str(tmp_path), strategy]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert run.returncode == 0, run.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"2_{rank}.json").read_text()) for rank in (0, 1))
    assert (first["sizes"], second["sizes"]) == ([2], [1, 2])
    assert first["sums"] == second["sums"]
    assert first["losses"] == second["losses"]
    alone = train(tmp_path, devices=1)
    for name in ("losses", "sums"):
        assert alone[name][: SPIKE - 1] == pytest.approx(first[name][: SPIKE - 1], rel=1e-6)
    sums = first["sums"]
    assert sums[SPIKE - 1] in sums[SPIKE - 4 : SPIKE - 2]
    assert sums[SPIKE] not in sums[:SPIKE]
    assert f"step {SPIKE}: the loss of " in run.stderr
    assert "(rank 1)" in run.stderr
    assert run.stderr.count("is a spike") == 1


if __name__ == "__main__":
    spikes._LEAST = FEWEST
    train(Path(sys.argv[1]), strategy=ShardedStrategy if sys.argv[2] == "sharded" else DDPStrategy)
