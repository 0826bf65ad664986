"""Jobs of SLURM that are put back in the queue before their time ends, and find their run again.

Lightning (2.6) saves within the signal's handler. Where several ranks train, some are then in the middle of a
backward pass, and all wait for each other for ever. Its checkpoint lies in the current folder, where any
other job finds it, too. So a run stops between two steps, as on Ctrl-C, and its folder tells whose it is.
"""

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from moka_pl._compat import cluster_environment
from moka_pl.errors import one_line

#: What to do about a run that has ended early.
RESUME = "To resume, add --ckpt_path last to the same command"

#: Beside the checkpoints of a run: the job and the command that it belongs to.
_NAME = "slurm_job.json"


def take_over(trainer: Trainer) -> int | None:
    """Keeps Lightning from requeueing the job of a run itself.

    Args:
        trainer: The trainer, before it installs signal handlers.

    Returns:
        The signal that asks for it; None where no job is to be requeued.
    """
    environment = cluster_environment(trainer)
    if not isinstance(environment, SLURMEnvironment) or not environment.auto_requeue or job() is None:
        return None
    environment.auto_requeue = False
    return environment.requeue_signal


def job() -> str | None:
    """Returns the number of this process's job, as ``scontrol`` takes it; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def restarted() -> bool:
    """Whether this job has been started before."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") != "0" and job() is not None


def sign(folder: Path) -> None:
    """Notes in a run's folder of checkpoints which job and command it belongs to, if it can be written to."""
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _NAME).write_text(json.dumps(_signature()), encoding="utf-8")


def is_ours(folder: Path) -> bool:
    """Whether a folder of checkpoints is that of this job's same command, started before."""
    try:
        return bool(json.loads((folder / _NAME).read_text(encoding="utf-8")) == _signature())
    except (OSError, ValueError):
        return False


def requeue() -> str:
    """Puts this job back in the queue.

    Returns:
        What the job will do, for who reads the log.
    """
    number = str(job())
    try:
        done = subprocess.run(["scontrol", "requeue", number], capture_output=True, text=True, check=False)
        words = " ".join(done.stderr.split()) or f"status {done.returncode}"
        refused = words if done.returncode else None
    except OSError as error:
        refused = one_line(error)
    if refused is None:
        return f"Job {number} is back in the queue; it goes on from there"
    return f"Job {number} cannot be put back in the queue ({refused}). {RESUME}"


def _signature() -> dict[str, object]:
    return {"job": job(), "arguments": sys.argv[1:]}
