"""Training steps replayed as CUDA graphs on two GPUs; run with ``pytest -m gpu``."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from shared.environment import own_environment
from shared.graph_fit import fit

from moka_pl.adapters import adapter_state

pytestmark = pytest.mark.gpu

STEPS = 20


def run(folder: Path, devices: int, graphs: bool) -> None:
    """Trains, and writes down a rank's losses."""
    module, trainer, keep = fit(graphs, devices, max_steps=STEPS, limit_val_batches=0)
    sums = {key: float(value.double().sum()) for key, value in adapter_state(module.causal_lm).items()}
    record = {"losses": keep.losses, "graphs": keep.graphs, "world": trainer.world_size, "sums": sums}
    name = f"{devices}-{'graphs' if graphs else 'launched'}-rank{trainer.global_rank}.json"
    (folder / name).write_text(json.dumps(record), encoding="utf-8")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, dict[str, Any]]:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("ddp")

    def run_pair(pair: tuple[int, int]) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, __file__, str(folder), *map(str, pair)]
        return subprocess.run(command, env=own_environment(), capture_output=True, text=True, timeout=300)

    with ThreadPoolExecutor(3) as together:  # the most of each is the start of its processes
        for ended in together.map(run_pair, ((2, 0), (2, 1), (1, 0))):
            assert ended.returncode == 0, ended.stdout + ended.stderr
            assert "AccumulateGrad node's stream" not in ended.stderr + ended.stdout
    return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in folder.glob("*.json")}


def test_every_rank_replays_its_steps(runs):
    assert sorted(runs) == [
        "1-launched-rank0",
        "2-graphs-rank0",
        "2-graphs-rank1",
        "2-launched-rank0",
        "2-launched-rank1",
    ]
    for rank in range(2):
        assert runs[f"2-graphs-rank{rank}"]["graphs"] > 0
        assert runs[f"2-graphs-rank{rank}"]["world"] == 2


def test_losses_are_those_of_launched_steps_and_of_one_gpu(runs):
    names = ("2-graphs-rank0", "2-launched-rank0", "1-launched-rank0")
    replayed, launched, single = (torch.tensor(runs[name]["losses"]) for name in names)
    assert len(launched) == STEPS
    assert launched[-4:].mean() < launched[:4].mean()
    torch.testing.assert_close(replayed, launched, rtol=2e-3, atol=0)
    torch.testing.assert_close(launched, single, rtol=2e-3, atol=0)


def test_both_ranks_end_with_the_same_adapter(runs):
    assert runs["2-graphs-rank0"]["sums"] == runs["2-graphs-rank1"]["sums"]


if __name__ == "__main__":
    run(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "1")
