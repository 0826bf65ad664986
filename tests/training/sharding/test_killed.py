"""Runs of two processes that are killed at random moments, or fail on purpose, and go on.

Run as a script, this file forks the processes of all runs: they import nothing anew. The environment's
``KILLED_RUNS`` is how many are killed, of which the first are the same whatever their number.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from lightning.pytorch.strategies.launchers import subprocess_script
from shared import failing_rank
from shared.environment import own_environment
from shared.failing_rank import FAILS_IN, LIMIT

from moka_pl.adapters.reading import read_adapter_state
from moka_pl.cli.failures import watch
from moka_pl.cli.main import main
from moka_pl.errors import DataError
from moka_pl.training.writing.checkpoint_files import unusable_reason

pytestmark = pytest.mark.slow

MOMENTS = int(os.environ.get("KILLED_RUNS", "3"))
WHO = ([0], [1], [0, 1])  # ranks that are killed, in turn
STEPS = 16
RAISING = ("raises-data-0", "raises-other-1")
LACKING = ("no-data-0", "no-data-1")
#: Of plain DDP, where the rank that does not fail waits for the other one for ever, as GPUs do.
STUCK = {"stuck-raises-data-0": 2, "stuck-raises-data-1": 2, "stuck-killed-1": 1, "stuck-killed-0": -9}


class Started:
    """The second process, forked before the first has begun, and begun when Lightning would start it."""

    def __init__(self, name, arguments):
        self.returncode, self._begin = None, os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._begin[1])
            environment = json.loads(os.fdopen(self._begin[0]).read() or os._exit(9))
            os.environ |= environment
            spoil(name, 1)
            fit(name, given(name, 1, arguments))
        os.close(self._begin[0])

    def begin(self, command, env, cwd):
        os.write(self._begin[1], json.dumps(env).encode())
        os.close(self._begin[1])
        return self

    def poll(self):
        if self.returncode is None:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if done else None
        return self.returncode

    def wait(self, timeout):
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("fit", timeout)
            time.sleep(0.01)

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def fit(name, arguments):
    """Runs the command in this process, and ends it."""
    status = 1
    try:
        main(["fit", "--config", "config.yaml", f"--trainer.logger.init_args.name={name}", *arguments])
        status = 0
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def spoil(name, rank):
    """Has a rank fail, where a run's name says so."""
    failing_rank.spoil(name, name[-1] == str(rank), DataError if "data" in name else KeyError)


def given(name, rank, arguments):
    """The arguments of a rank, which has no data where a run's name says so."""
    missing = ("--data.init_args.path", "missing.jsonl")
    return (*arguments, *(missing if name == f"no-data-{rank}" else ()))


def start(name, arguments):
    """Forks both processes of a run, and returns their numbers."""
    told, tell = os.pipe()
    first = os.fork()
    if first == 0:
        output = os.open(f"{name}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        second = Started(name, arguments)
        os.write(tell, str(second.pid).encode())
        os.close(tell)
        subprocess_script.subprocess = SimpleNamespace(Popen=second.begin)
        spoil(name, 0)
        fit(name, given(name, 0, arguments))
    os.close(tell)
    return first, int(os.read(told, 20))


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def run(name, *arguments, killed=(), anywhere=False, after=0.0):
    """Runs two processes, of which some are killed.

    Args:
        name: Of the run.
        *arguments: More of the command's.
        killed: The ranks that are killed.
        anywhere: Whether ``after`` counts from the start, not from the first step.
        after: When they are killed, in seconds.

    Returns:
        The first one's exit code; the seconds to the first step, or to the kill; the seconds from there to
        the end of the last process.
    """
    pids = start(name, arguments)
    begun = time.monotonic()
    checkpoints = Path("lightning_logs", name, "version_0", "checkpoints")
    while not anywhere and not any(checkpoints.glob("*.ckpt")) and is_alive(pids[0]):
        time.sleep(0.002)
    if killed:
        time.sleep(after)
    trained = time.monotonic()
    for rank in killed:
        with suppress(ProcessLookupError):
            os.kill(pids[rank], signal.SIGKILL)
    while any(map(is_alive, pids)) and time.monotonic() < trained + 2 * LIMIT:
        time.sleep(0.01)
    ended = time.monotonic()
    for pid in filter(is_alive, pids):
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pids[0], 0)[1]), trained - begun, ended - trained


def try_moments(count, seed):
    """Kills as many runs, each at another moment of its life, and lets them go on to their end."""
    for name in ("bitsandbytes", "moka_pl.cli.lightning", "transformers.models.llama.modeling_llama"):
        import_module(name)
    code, loading, training = run("whole")
    record = {"whole": [code, loading, training], "runs": []}
    pick = random.Random(seed)
    for number in range(count):
        name, killed, anywhere = f"run{number}", WHO[number % len(WHO)], number % 4 == 3
        after = pick.uniform(0, loading if anywhere else training)
        code, _, seconds = run(name, killed=killed, anywhere=anywhere, after=after)
        files = sorted(Path("lightning_logs", name).rglob("*.ckpt"))
        stored = [torch.load(file, weights_only=True)["global_step"] for file in files]
        found = {"killed": killed, "after": after, "code": code, "seconds": seconds, "steps": stored}
        found["damaged"] = [reason for file in files if (reason := unusable_reason(file))]
        found["again"] = run(name, *(["--ckpt_path", "last"] if files else []))[0]
        record["runs"].append(found)
    record |= {name: run(name) for name in (*RAISING, *LACKING)}
    watch._GRACE = 2.0
    for name in STUCK:
        code, *_ = run(name, "--trainer.strategy", "ddp", "--checkpoint.every_n_train_steps", "100")
        record[name] = code, time.time() - float(Path(failing_rank.TIME).read_text())
    Path("record.json").write_text(json.dumps(record))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    failing_rank.write_run(folder, STEPS, every=1, strategy="sharded")
    ended = subprocess.run(
        [sys.executable, __file__, str(MOMENTS), "0"],
        env=own_environment(folder / "cache"),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=250 + 30 * MOMENTS,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def record(folder):
    return json.loads((folder / "record.json").read_text())


def final(folder, name):
    """What a run leaves at its end: the adapter, and all tensors of the last checkpoint."""
    log = max((folder / "lightning_logs" / name).iterdir())  # without a checkpoint it has begun again
    stored = torch.load(log / "checkpoints" / "last.ckpt", weights_only=True)
    states = stored["optimizer_states"][0]["state"]
    tensors = {f"{n}.{key}": t for n, state in states.items() for key, t in state.items()}
    assert stored["global_step"] == STEPS
    return {**read_adapter_state(log / "adapters/last"), **stored["state_dict"], **tensors}


def test_the_uninterrupted_run_ends_well(record):
    assert record["whole"][0] == 0


@pytest.mark.parametrize("number", range(MOMENTS))
def test_all_processes_end_and_no_file_is_damaged(record, number):
    killed = record["runs"][number]
    if 0 in killed["killed"]:
        assert killed["code"] in (-signal.SIGKILL, 0)  # 0: it had ended before
    else:
        assert killed["code"] in (0, 1, -signal.SIGKILL)  # by Lightning, if it was the first to notice
    assert killed["seconds"] < LIMIT
    assert killed["damaged"] == []


@pytest.mark.parametrize("number", range(MOMENTS))
def test_it_goes_on_bit_for_bit(folder, record, number):
    assert record["runs"][number]["again"] == 0, (folder / f"run{number}.txt").read_text()[-3000:]
    mine, whole = final(folder, f"run{number}"), final(folder, "whole")
    assert mine.keys() == whole.keys()
    for name, tensor in whole.items():
        assert torch.equal(mine[name], tensor), name


def test_what_is_left_of_a_killed_process_says_so_in_one_line(folder, record):
    for number, killed in enumerate(record["runs"]):
        text = (folder / f"run{number}.txt").read_text()
        assert "Traceback" not in text
        told = text.count("moka_pl: error: another process of this run has ended without a word")
        assert told == (killed["code"] == 1)


@pytest.mark.parametrize("name", RAISING)
def test_a_process_that_raises_ends_all_with_its_own_error_alone(folder, record, name):
    code, _, seconds = record[name]
    text = (folder / f"{name}.txt").read_text()
    known = "data" in name
    assert code == (2 if known else 1)
    assert seconds < LIMIT
    assert text.count("moka_pl: error: failed on purpose") == text.count("moka_pl: error: ") == known
    assert text.count("Traceback") == text.count("KeyError: 'failed on purpose'") == (not known)


@pytest.mark.parametrize("name", LACKING)
def test_a_process_without_data_ends_all_with_the_one_error(folder, record, name):
    code, until_end, after = record[name]
    text = (folder / f"{name}.txt").read_text()
    assert code == 2
    assert until_end + after < LIMIT
    assert text.count("missing.jsonl does not exist") == text.count("moka_pl: error: ") == 1
    assert "Traceback" not in text
    assert not list((folder / "lightning_logs").glob(f"{name}/**/*.ckpt"))


@pytest.mark.parametrize("name", STUCK)
def test_who_waits_for_a_process_that_has_failed_is_ended_and_the_run_saved(folder, record, name):
    code, seconds = record[name]
    text = (folder / f"{name}.txt").read_text()
    assert code == STUCK[name]
    assert seconds < LIMIT
    told = "failed on purpose" if "raises" in name else "another process of this run has ended without a word"
    assert text.count(f"moka_pl: error: {told}") == text.count("moka_pl: error: ") == (code > 0)
    assert "Traceback" not in text
    (saved,) = (folder / "lightning_logs" / name).rglob("*.ckpt") if code > 0 else (None,)
    if saved is not None:
        assert torch.load(saved, weights_only=True)["global_step"] == FAILS_IN - 1
        assert f"Ended after step {FAILS_IN - 1}; checkpoint saved in" in text


if __name__ == "__main__":
    try_moments(int(sys.argv[1]), int(sys.argv[2]))
