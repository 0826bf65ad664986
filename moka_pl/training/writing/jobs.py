"""Work that one thread does in order, while others go on."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class Jobs:
    """What one thread does in order; once something fails, it does nothing more until that is told."""

    def __init__(self) -> None:
        self._pool: ThreadPoolExecutor | None = None
        self._jobs: deque[Future[None]] = deque()
        self._failed = False
        self._asking = threading.RLock()

    def add(self, job: Callable[..., Any], *arguments: Any) -> None:
        """Has the thread do something after all that it was told before."""
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, "moka_pl checkpoints")
        self._jobs.append(self._pool.submit(self._do, job, arguments))

    def _do(self, job: Callable[..., Any], arguments: Sequence[Any]) -> None:
        if self._failed:  # an older file must not go where the new one is not there
            return
        try:
            job(*arguments)
        except BaseException:
            self._failed = True
            raise

    def check(self) -> None:
        """Raises what has failed by now."""
        if self._failed or all(job.done() for job in self._jobs):
            self.finish()

    def finish(self) -> None:
        """Waits for all, and raises what has failed."""
        with self._asking:
            wait(self._jobs)
            errors = [error for job in self._jobs if (error := job.exception()) is not None]
            self._jobs.clear()
            self._failed = False
        if errors:
            raise errors[0]

    def end(self) -> None:
        """Waits for all, ends the thread, and raises what has failed."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        self.finish()
