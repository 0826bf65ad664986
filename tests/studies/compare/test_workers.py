import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from moka_pl.studies.compare.workers import Workers, _Worker, worker_environment

REPOSITORY = Path(__file__).parents[3]


def test_workers_are_spread_over_gpus(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = [worker_environment(number, 2, [0, 3])["CUDA_VISIBLE_DEVICES"] for number in range(4)]
    assert seen == ["0", "3", "0", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    seen = [worker_environment(number, 2, [0, 1])["CUDA_VISIBLE_DEVICES"] for number in range(3)]
    assert seen == ["5", "7", "5"]
    alone = worker_environment(0, 3, None)
    assert "CUDA_VISIBLE_DEVICES" not in alone
    assert alone["OMP_NUM_THREADS"] == "3"


def test_a_task_for_a_worker_that_has_died_is_left_to_the_wait():
    ours, theirs = multiprocessing.Pipe()
    theirs.close()
    workers = object.__new__(Workers)
    workers._workers = {0: _Worker(0, None, ours, ready=True)}
    workers.give(0, "task")
    assert workers.busy == ["task"]


@pytest.mark.slow
def test_a_worker_that_dies_with_nothing_to_do_is_replaced(tmp_path):
    workers = Workers(tmp_path, 1)
    try:
        while not workers.idle:
            assert workers.wait(60) == []
        dead = workers._workers[0].process
        dead.kill()
        dead.join()
        while workers._workers[0].process is dead or not workers.idle:
            assert workers.wait(60) == []
        assert workers._workers[0].process.is_alive()
    finally:
        workers.stop()


class Command:
    """The tiny suite in two processes; its lines can be waited for."""

    def __init__(self, out, cache):
        options = ["--suite=tiny", f"--out={out}", "--jobs=2", "--methods", "KronA", "--seeds", "0", "1"]
        options += ["--set=training.trainer.accelerator=cpu", "--set=data.init_args.batch_size=4"]
        options += ["--set=data.init_args.tasks=[boolean]", "--set=training.trainer.max_steps=4"]
        command = [sys.executable, str(REPOSITORY / "scripts" / "compare.py"), *options]
        environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "HF_DATASETS_CACHE": str(cache)}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.lines = []

    def until(self, start):
        for line in self.process.stdout:
            self.lines.append(line.rstrip("\n"))
            if line.startswith(start):
                return
        pytest.fail("\n".join(self.lines))

    def end(self):
        self.lines += self.process.stdout.read().splitlines()
        return self.process.wait(60)

    def done(self):
        return [line.partition("] ")[2].partition(":")[0] for line in self.lines if line.startswith("[")]


@pytest.mark.slow
def test_a_killed_command_takes_its_processes_along_and_goes_on(tmp_path, dataset_cache):
    out = tmp_path / "out"
    command = Command(out, dataset_cache)
    command.until("[2/")
    workers = children(command.process.pid)
    command.process.kill()
    command.end()
    first = command.done()
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while any(is_alive(worker) for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_alive(worker) for worker in workers)
    command = Command(out, dataset_cache)
    assert command.end() == 0, command.lines
    # Nothing is done twice: there are the frozen base, two rates, and the picked one's test and other seed.
    runs = [*first, *command.done()]
    assert len(runs) <= 5
    report = json.loads((out / "tiny" / "report.json").read_text())
    assert report["missing"] == []
    assert report["rows"][1]["seeds"] == [0, 1]


def children(parent):
    found = subprocess.run(["ps", "-o", "pid=", "--ppid", str(parent)], capture_output=True, text=True)
    return [int(pid) for pid in found.stdout.split()]


def is_alive(pid):
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
