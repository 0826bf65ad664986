"""How training speed grows with the number of GPUs; ``scripts/data_parallel_speed.py`` runs it.

As a module, ``python -m moka_pl.studies.benchmark.data_parallel GIB fit …`` is the command line with a limit
to the GPU's memory.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from moka_pl.studies.common import Parser

DESCRIPTION = """\
Measures how training speed grows with the number of GPUs, through the command line that users run.

    python scripts/data_parallel_speed.py --devices 1 2

Trains a 4-bit model of LLaMA2-7B's shape with random weights (nothing is downloaded) on the package's sample
instructions, once for each number of devices, and prints the median of the logged tokens per second.
"""
#: Steps at the beginning whose speed does not count.
_WARMUP = 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table and JSON.

    Args:
        arguments: Default: the process's.
    """
    parser = Parser("data_parallel_speed", DESCRIPTION)
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2], help="numbers of GPUs")
    parser.add_argument("--shape", default="llama2-7b", help="shape of the model (see BackboneConfig.name)")
    parser.add_argument("--batch-size", type=int, default=8, help="examples per GPU")
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of each run")
    parser.add_argument(
        "--strategy", default="ddp", help="Lightning's name, such as sharded or sharded_offload"
    )
    parser.add_argument("--memory-limit", type=float, help="GiB of each GPU that may be used")
    args = parser.parse_args(arguments)
    limits = {"strategy": args.strategy, "memory_limit": args.memory_limit}
    rows = [measure(n, args.shape, args.batch_size, args.steps, **limits) for n in args.devices]
    first = rows[0]["tokens_per_second"]
    print(f"{'devices':>8}{'tokens/s':>12}{'ratio':>8}{'peak GiB':>10}")
    for row in rows:
        speed = row["tokens_per_second"]
        print(f"{row['devices']:>8}{speed:>12,.0f}{speed / first:>8.2f}{row['peak_memory_gib']:>10.2f}")
    print(json.dumps(rows))


def measure(
    devices: int,
    shape: str,
    batch_size: int,
    steps: int,
    strategy: str = "ddp",
    memory_limit: float | None = None,
) -> dict[str, float]:
    """Runs one training and reads its speed from the TensorBoard events, without the first steps.

    Args:
        devices: Number of GPUs.
        shape: Shape of the model.
        batch_size: Examples per GPU.
        steps: Optimizer steps.
        strategy: Lightning's name of the strategy.
        memory_limit: GiB of each GPU that may be used; None for all.

    Returns:
        ``devices``, ``tokens_per_second`` (median) and ``peak_memory_gib``.
    """
    from moka_pl.inspection.history import read_scalars

    with tempfile.TemporaryDirectory() as folder:
        # Each rank runs the same command, and so limits its own GPU.
        command = [sys.executable, "-m", "moka_pl", "fit"]
        if memory_limit is not None:
            command = [sys.executable, "-m", __name__, str(memory_limit), "fit"]
        command += ["--config", "configs/llama2_ddp.yaml"]
        options = {
            "model.backbone.name": shape,
            "model.backbone.weights": "random",
            "data.init_args.path": "sample",
            "data.init_args.prompt": "chat",
            "data.init_args.batch_size": batch_size,
            "data.init_args.packing": False,
            "trainer.devices": devices,
            "trainer.strategy": strategy,
            "trainer.accumulate_grad_batches": 1,
            "trainer.max_epochs": -1,
            "trainer.max_steps": steps,
            "trainer.limit_val_batches": 0,
            "trainer.val_check_interval": 1.0,
            "trainer.log_every_n_steps": 5,
            "trainer.logger.init_args.save_dir": folder,
        }
        command += [f"--{name}={value}" for name, value in options.items()]
        subprocess.run(command, check=True)
        logged = list(read_scalars(next(Path(folder).glob("*/version_0"))))
    speeds = [value for step, tag, value in logged if tag == "train/tokens_per_second" and step > _WARMUP]
    peak = max(value for _, tag, value in logged if tag == "train/peak_memory_gib")
    return {"devices": devices, "tokens_per_second": median(speeds), "peak_memory_gib": peak}


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
