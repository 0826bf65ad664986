"""Two ranks on GPUs of which one fails, and the other waits for it in NCCL; run with ``pytest -m gpu``."""

import shutil
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import pytest
import torch
from shared.failing_rank import FAILS_IN, LIMIT, PURPOSE, FailingRun, write_run

pytestmark = pytest.mark.gpu

STEPS = 6
LOST = "another process of this run has ended without a word"
WITHIN = "The first process is within a step, of which there is no checkpoint"
MISSING = "missing.jsonl does not exist"


class Case(NamedTuple):
    """A rank that fails.

    Attributes:
        strategy: Of the run.
        how: How it does.
        rank: Which one.
        code: What the first process ends with.
        error: What the one line says.
    """

    strategy: str
    how: str
    rank: int
    code: int
    error: str

    @property
    def name(self) -> str:
        return f"{self.strategy}-{self.how}-{self.rank}"


CASES = [
    Case(strategy, *case)
    for strategy in ("ddp", "sharded")
    for case in (
        ("raises", 1, 2, PURPOSE),
        ("raises", 0, 2, PURPOSE),
        ("killed", 1, 1, LOST),
        ("no-data", 1, 2, MISSING),
    )
]
SAVED = [case for case in CASES if case.how != "no-data"]


#: Bytes of shared memory that NCCL may take for all runs at once.
SHARED_MEMORY = 2**31


def finish_all(begin):
    """Begins runs, all at once where NCCL finds the memory, and waits for them; returns what each was."""
    together = shutil.disk_usage("/dev/shm").free > SHARED_MEMORY
    begun = {name: run() if together else run for name, run in begin.items()}
    if not together:
        return {name: run().finish(200) for name, run in begun.items()}
    with ThreadPoolExecutor(len(begun)) as waiting:  # each sees the end of its own run
        return dict(zip(begun, waiting.map(lambda run: run.finish(200), begun.values()), strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All runs at once, then all that can go on at once: the most of each is the start of its processes."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("failing")
    ports = {}
    with ExitStack() as sockets:  # held together, so that all are different
        for case in CASES:
            free = sockets.enter_context(socket.socket())
            free.bind(("127.0.0.1", 0))
            ports[case.name] = str(free.getsockname()[1])
    for case in CASES:
        (folder / case.name).mkdir()
        write_run(folder / case.name, STEPS, every=1, accelerator="gpu", strategy=case.strategy)
    failing = {
        case.name: partial(FailingRun, folder / case.name, case.rank, case.how, port=ports[case.name])
        for case in CASES
    }
    last = ("--ckpt_path", "last")
    resumed = {
        case.name: partial(FailingRun, folder / case.name, -1, "resumed", *last, port=ports[case.name])
        for case in SAVED
    }
    return finish_all(failing), finish_all(resumed), folder


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_all_processes_end_with_the_one_error(runs, case):
    code, seconds, left, text = runs[0][case.name]
    assert not left
    assert 0 < seconds < LIMIT, text[-3000:]
    assert code == case.code, text[-3000:]
    assert text.count("moka_pl: error: ") == 1, text[-3000:]
    assert case.error in text
    assert "Traceback" not in text


@pytest.mark.parametrize("case", SAVED, ids=lambda case: case.name)
def test_the_first_rank_saves_the_run_or_says_that_its_gpu_is_within_a_step(runs, case):
    text = runs[0][case.name][3]
    saved = f"Ended after step {FAILS_IN - 1}; checkpoint saved in" in text
    assert saved or (case.rank != 0 and WITHIN in text), text[-3000:]


@pytest.mark.parametrize("case", SAVED, ids=lambda case: case.name)
def test_the_run_goes_on(runs, case):
    code, _, left, text = runs[1][case.name]
    assert code == 0, text[-3000:]
    assert not left
    stored = (runs[2] / case.name).rglob("last.ckpt")
    assert max(torch.load(path, weights_only=True)["global_step"] for path in stored) == STEPS
