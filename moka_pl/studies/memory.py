"""Peak memory of a stretch of work."""

import contextlib
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_PROCESS = Path("/proc/self")


def reset_peak(device: "torch.device") -> None:
    """Begins a new peak: of the GPU's allocations, or on Linux of this process's resident memory."""
    if device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            (_PROCESS / "clear_refs").write_text("5")


def peak_gib(device: "torch.device") -> float:
    """The peak since :func:`reset_peak` in GiB; elsewhere than on Linux and GPUs, since the process began."""
    from moka_pl.callbacks.throughput import peak_memory

    if device.type != "cuda":
        with contextlib.suppress(OSError):
            found = re.search(r"^VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
            if found is not None:
                return int(found[1]) / 2**20
    return peak_memory(device)


def free_memory() -> None:
    """Gives back what nothing refers to any more, the GPU's cached blocks included."""
    import gc

    import torch

    gc.collect()  # models and tracebacks have reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
