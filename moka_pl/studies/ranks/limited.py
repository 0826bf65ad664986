"""The command line with a limit to the GPU's memory.

``python -m moka_pl.studies.ranks.limited GIB fit …`` runs ``python -m moka_pl fit …``.
"""

import os
import sys
from collections.abc import Sequence


def run_limited(arguments: Sequence[str]) -> None:
    """Limits the GPU of this rank to the GiB of the first argument, and runs the command line of the others.

    Args:
        arguments: GiB, and the arguments of ``python -m moka_pl``.
    """
    import torch

    from moka_pl.cli.main import main as run

    gib, *rest = arguments
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0"))
        share = float(gib) * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    run(rest)


if __name__ == "__main__":
    run_limited(sys.argv[1:])
