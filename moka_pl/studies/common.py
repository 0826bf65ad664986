"""What the benchmark runs on: device and versions."""

import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
