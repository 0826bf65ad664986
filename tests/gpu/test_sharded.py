"""A sharded base on GPUs; run with ``pytest -m gpu``."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from shared.environment import own_environment

from moka_pl.adapters import MokaConfig, adapter_state
from moka_pl.backbone import BackboneConfig
from moka_pl.data import InstructionData
from moka_pl.training.module import MokaModule

pytestmark = pytest.mark.gpu

STEPS = 12
GLOBAL_BATCH = 4


def run(folder: Path, strategy: str, devices: int) -> None:
    """Trains, and writes down a rank's losses and its memory between steps and at its peak."""
    torch.manual_seed(5)
    rows = [
        {"instruction": f"{n}?", "output": "word " * (1 + 3 * (n % 4))} for n in range(STEPS * GLOBAL_BATCH)
    ]
    path = folder / f"{strategy}-{devices}-{os.environ.get('LOCAL_RANK', '0')}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = InstructionData(path, batch_size=GLOBAL_BATCH // devices, max_length=256, prompt="alpaca")
    module = MokaModule(
        # In bfloat16, gradients that attention adds in any order would round weights to other neighbours.
        BackboneConfig("llama3-1b", weights="random", compute_dtype="float32"),
        MokaConfig(components=3, target_modules="all-linear"),
        gradient_checkpointing=True,
    )
    losses: list[float] = []
    module.on_train_batch_end = lambda *_: losses.append(  # type: ignore[method-assign]
        float(module.trainer.callback_metrics["train/loss"])
    )
    trainer = Trainer(
        accelerator="gpu",
        devices=devices,
        strategy=strategy,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, data)
    sums = {key: float(value.double().sum()) for key, value in adapter_state(module.causal_lm).items()}
    peak = torch.cuda.max_memory_allocated(trainer.strategy.root_device)
    record = {"losses": losses, "sums": sums, "peak": peak}
    name = f"{strategy}-{devices}-rank{trainer.global_rank}.json"
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("sharded")
    pairs = [("auto", 1), ("sharded_offload", 1)]
    if torch.cuda.device_count() > 1:
        pairs += [("ddp", 2), ("sharded", 2), ("sharded_offload", 2)]

    def run_pair(pair: tuple[str, int]) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, __file__, str(folder), pair[0], str(pair[1])]
        return subprocess.run(command, env=own_environment(), capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(len(pairs)) as together:  # the most of each is the start of its processes
        for ended in together.map(run_pair, pairs):
            assert ended.returncode == 0, ended.stdout + ended.stderr
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*rank*.json")}


def test_an_offloaded_base_trains_as_one_on_the_device(runs):
    whole, offloaded = runs["auto-1-rank0"], runs["sharded_offload-1-rank0"]
    assert len(whole["losses"]) == STEPS
    torch.testing.assert_close(
        torch.tensor(offloaded["losses"]), torch.tensor(whole["losses"]), rtol=1e-5, atol=0
    )
    assert offloaded["peak"] < whole["peak"] - 300 * 2**20  # of about 540 MiB in 16 blocks


@pytest.mark.parametrize("strategy", ["sharded", "sharded_offload"])
def test_two_ranks_train_as_under_ddp(runs, strategy):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for rank in range(2):
        ddp, sharded = runs[f"ddp-2-rank{rank}"], runs[f"{strategy}-2-rank{rank}"]
        torch.testing.assert_close(
            torch.tensor(sharded["losses"]), torch.tensor(ddp["losses"]), rtol=1e-5, atol=0
        )
        assert sharded["peak"] < ddp["peak"] - 150 * 2**20
    assert runs[f"{strategy}-2-rank0"]["sums"] == runs[f"{strategy}-2-rank1"]["sums"]


if __name__ == "__main__":
    run(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
