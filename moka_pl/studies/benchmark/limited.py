"""The command line with a limit to the GPU's memory: ``python -m ….limited GIB fit …``."""

import os
import sys
from collections.abc import Sequence

import torch

from moka_pl.cli.main import main as run


def main(arguments: Sequence[str] | None = None) -> None:
    """Limits the GPU of this rank to the GiB of the first argument, and runs the others.

    Args:
        arguments: Default: the process's.
    """
    gib, *rest = sys.argv[1:] if arguments is None else arguments
    if torch.cuda.is_available():
        device = int(os.environ.get("LOCAL_RANK", "0"))
        share = float(gib) * 2**30 / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(share, 1.0), device)
    run(rest)


if __name__ == "__main__":
    main()
