"""Host and GPU times of the parts of training steps, taken without waiting for the GPU."""

from itertools import pairwise
from typing import Any

import torch

from moka_pl.studies.common import Moment

#: The parts of a step, in their order.
PARTS = ("between", "forward", "backward", "update")


class StepTimes:
    """Marks the parts of every step on the host's clock and in the GPU's queue (see :class:`Moment`).

    ``between`` reaches from the end of the last step to the begin of this one: what is logged and saved
    after a step, and loading the next batch. ``forward``, ``backward`` (with the sum over ranks) and
    ``update`` (checks, clipping, optimizer) follow. A mark on the GPU is an event in its queue: the host
    does not wait for it, and the time between two is what the GPU took from one to the other, idle or not.
    A GPU that has work all the time shows nearly nothing of ``between``; the time that it waits for the host
    to launch a pass belongs to the pass.

    Args:
        device: Where the model is trained.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._moments: list[Moment] = []
        self._after_log: list[bool] = []

    def mark(self) -> None:
        """Marks the end of a part; the first mark begins the first step."""
        self._moments.append(Moment(self._device))

    def end_step(self, logs: bool) -> None:
        """Marks the end of a step.

        Args:
            logs: Whether its metrics are about to be logged.
        """
        self.mark()
        self._after_log.append(logs)

    def collect(self) -> dict[str, Any]:
        """Returns milliseconds of all steps by part.

        Returns:
            ``after_log`` (whether the step before was logged, which shows in ``between`` and in the launches
            that follow it), ``host_ms`` and ``gpu_ms`` (None on a CPU), each with a list a part.
        """
        steps = len(self._after_log)
        pairs = list(pairwise(self._moments[: len(PARTS) * steps + 1]))
        gpu = [end.gpu_ms_since(begin) for begin, end in pairs]
        return {
            "after_log": [False, *self._after_log[:-1]][:steps],
            "host_ms": _by_part([end.host_ms_since(begin) for begin, end in pairs]),
            "gpu_ms": None if None in gpu else _by_part([ms for ms in gpu if ms is not None]),
        }


def _by_part(times: list[float]) -> dict[str, list[float]]:
    return {part: [round(ms, 3) for ms in times[i :: len(PARTS)]] for i, part in enumerate(PARTS)}


def step_seconds(steps: dict[str, Any]) -> list[float]:
    """Returns the seconds of each step, from the end of the one before: the GPU's where there is one.

    Args:
        steps: What :meth:`StepTimes.collect` has returned.
    """
    parts = steps["gpu_ms"] or steps["host_ms"]
    return [sum(one) / 1e3 for one in zip(*(parts[part] for part in PARTS), strict=True)]
