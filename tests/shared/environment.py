"""What a run that a test starts in other processes has in its environment."""

import os
from pathlib import Path

#: Variables of the part of a run that a process is. Lightning leaves them to later tests, SLURM to its jobs.
_OTHERS = ("PL_", "MASTER_", "LOCAL_RANK", "WORLD_SIZE", "SLURM_")


def own_environment(cache: Path | None = None) -> dict[str, str]:
    """Returns this process's environment without another run's variables; this folder can be imported.

    Args:
        cache: The folder of encoded data; None leaves it where it is.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith(_OTHERS)}
    paths = [str(Path(__file__).parents[1]), clean.get("PYTHONPATH", "")]
    clean["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return clean if cache is None else clean | {"HF_DATASETS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
