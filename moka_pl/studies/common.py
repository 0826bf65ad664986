"""What the benchmark runs on: device and versions."""

import contextlib
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


_PACKAGES = (
    "moka_pl",
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "lightning",
    "triton",
    "liger-kernel",
)


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor with the number of threads that compute."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()} ({torch.get_num_threads()} threads)"


def versions() -> dict[str, str]:
    """Versions of Python, the packages that are installed, and CUDA if this torch has it."""
    import torch

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.version.cuda:
        found["cuda"] = torch.version.cuda
    return found


def _processor() -> str:
    try:  # Linux, where the platform module knows the architecture only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "CPU"


# Peak memory of a stretch of work.


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


# Reads what a run logged to TensorBoard.


def scalar_events(run: Path, tag: str) -> list[tuple[int, float]]:
    """The (step, value) pairs of a tag, in their order; none where it was not logged.

    Args:
        run: Folder of the event files.
        tag: Such as ``train/loss``.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]
