"""Processes that do tasks, spread over GPUs; they start once and serve until the end."""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

from moka_pl.errors import ConfigError
from moka_pl.studies.compare.runs import Outcome, Store
from moka_pl.studies.compare.schedule import Task

_READY = "ready"
#: Seconds that idle processes have to end.
_PATIENCE = 5.0


@dataclass(frozen=True)
class EndedTask:
    """A task that has ended, its outcome, and the seconds that it took."""

    task: Task
    outcome: Outcome
    seconds: float


@dataclass
class _Worker:
    number: int
    process: BaseProcess
    pipe: Connection
    ready: bool = False
    task: Task | None = None
    begun: float = 0.0


class Workers:
    """Starts processes and hands tasks to them.

    A process that dies, or in which a run fails, is replaced by a new one: a failure may have left its GPU
    in any state.

    Args:
        folder: Folder of the suites; what the processes print goes to its ``logs``.
        jobs: Number of processes.
        devices: Numbers of the GPUs, each process seeing one of them; None leaves them as they are.
    """

    def __init__(self, folder: Path, jobs: int, devices: Sequence[int] | None = None) -> None:
        self._folder, self._jobs, self._devices = folder, jobs, devices
        # Spawned: a forked process cannot use a GPU that its parent has used.
        self._context = multiprocessing.get_context("spawn")
        self._workers: dict[int, _Worker] = {}
        try:
            for number in range(jobs):
                self._workers[number] = self._start(number)
        except BaseException:
            self.stop()
            raise

    @property
    def idle(self) -> list[int]:
        """Numbers of the workers that have nothing to do."""
        return [w.number for w in self._workers.values() if w.ready and w.task is None]

    @property
    def busy(self) -> list[Task]:
        """What is being done."""
        return [worker.task for worker in self._workers.values() if worker.task is not None]

    def give(self, number: int, task: Task) -> None:
        """Hands a task to an idle worker."""
        worker = self._workers[number]
        worker.task, worker.begun = task, time.monotonic()
        with suppress(OSError):  # it has died; to wait for it tells
            worker.pipe.send(task)

    def wait(self, seconds: float | None = None) -> list[EndedTask]:
        """Waits until a worker has become idle.

        Args:
            seconds: How long at most; None for as long as it takes.

        Returns:
            Tasks that have ended.

        Raises:
            ConfigError: If a worker dies before it could do anything.
        """
        pipes = {worker.pipe: worker for worker in self._workers.values()}
        ended = []
        for pipe in connection.wait(list(pipes), seconds):
            assert isinstance(pipe, Connection)
            worker = pipes[pipe]
            try:
                message = pipe.recv()
            except (EOFError, OSError):
                message = None
            if message == _READY:
                worker.ready = True
                continue
            if message is None and worker.ready and worker.task is None:
                self._replace(worker)  # somebody ended it while it had nothing to do
                continue
            outcome = message if message is not None else self._after_death(worker)
            if worker.task is not None:
                ended.append(EndedTask(worker.task, outcome, time.monotonic() - worker.begun))
            worker.task = None
            if "error" in outcome:
                self._replace(worker)
        return ended

    def stop(self) -> None:
        """Ends all processes at once; what they were doing is lost."""
        for worker in self._workers.values():
            if worker.ready and worker.task is None:
                worker.pipe.close()  # then it ends by itself
            else:  # busy, or still importing
                worker.process.kill()
        end = time.monotonic() + _PATIENCE
        for worker in self._workers.values():
            worker.process.join(max(0.0, end - time.monotonic()))
            worker.process.kill()
            worker.process.join()
        self._workers.clear()

    def _start(self, number: int) -> _Worker:
        parent_end, worker_end = self._context.Pipe()
        threads = max(1, (os.cpu_count() or 1) // self._jobs)
        arguments = (worker_end, self._folder, _log(self._folder, number), threads)
        process = self._context.Process(target=_serve, args=arguments, daemon=True)
        with _environment(worker_environment(number, threads, self._devices)):
            process.start()
        worker_end.close()
        return _Worker(number, process, parent_end)

    def _replace(self, worker: _Worker) -> None:
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        self._workers[worker.number] = self._start(worker.number)

    def _after_death(self, worker: _Worker) -> Outcome:
        """The outcome of what a dead worker was doing, which it could not store itself."""
        what = self._death(worker)
        assert worker.task is not None
        store = Store(self._folder)
        known = store.read(worker.task.run)
        outcome = {key: known[key] for key in ("trained", "tested") if key in known} | {"error": what}
        store.write(worker.task.run, outcome)
        return outcome

    def _death(self, worker: _Worker) -> str:
        worker.process.join(5)
        log = _log(self._folder, worker.number)
        what = f"died with status {worker.process.exitcode}, probably out of memory; see {log}"
        if worker.task is None:
            self.stop()
            raise ConfigError(f"a process of --jobs {what}; finished runs are kept. Try fewer jobs")
        return f"its process {what}"


def worker_environment(number: int, threads: int, devices: Sequence[int] | None) -> dict[str, str]:
    """The environment variables of a worker, which hold from the start of its interpreter on.

    Args:
        number: Its number from 0.
        threads: Threads that it may compute with.
        devices: Numbers of the GPUs that workers are spread over, among those that this process sees.
    """
    variables = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    if devices is not None:
        device = devices[number % len(devices)]
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        variables["CUDA_VISIBLE_DEVICES"] = str(device) if not seen else seen.split(",")[device].strip()
    return variables


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _log(folder: Path, number: int) -> Path:
    return folder / "logs" / f"worker_{number}.log"


def _serve(pipe: Connection, folder: Path, log: Path, threads: int) -> None:
    """What a worker does until its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to see to
    threading.Thread(target=_die_with_parent, daemon=True).start()
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        import torch

        torch.set_num_threads(threads)
        from moka_pl.studies.compare.train import Executor

        execute = Executor(Store(folder))
        pipe.send(_READY)
        while True:
            try:
                task = pipe.recv()
            except EOFError:
                return
            pipe.send(execute(task.run, task.test))


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
