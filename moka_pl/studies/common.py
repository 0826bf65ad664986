"""What studies have in common: their command line, device and versions, memory, and files."""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import re
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

from moka_pl.errors import ConfigError, MokaError, system_failure
from moka_pl.utils import set_environment, silenced

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_PACKAGES = (
    "moka_pl",
    "torch",
    "transformers",
    "bitsandbytes",
    "peft",
    "lightning",
    "triton",
    "liger-kernel",
    "torchao",
    "hqq",
)
_LIGHTNING = ("lightning.pytorch", "lightning.fabric", "lightning_utilities.core.rank_zero")
_P = ParamSpec("_P")
_PROCESS = Path("/proc/self")


@contextlib.contextmanager
def silenced_lightning() -> Iterator[None]:
    """Runs the body without Lightning's messages on hardware and trainers."""
    with silenced(*_LIGHTNING), warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        yield


class Parser(argparse.ArgumentParser):
    """A command line whose description keeps its lines, and whose errors are one line: usage would hide them.

    The environment is set up as for the package's own commands.

    Args:
        name: The command's name, as errors begin with.
        description: What it does.
    """

    def __init__(self, name: str, description: str | None) -> None:
        super().__init__(
            prog=f"{name}.py",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.name = name
        set_environment()

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2."""
        print(f"{self.name}: error: {message}", file=sys.stderr)
        sys.exit(2)


def one_line_errors(name: str) -> Callable[[Callable[_P, None]], Callable[_P, None]]:
    """Ends a command with status 2 and one line on an error that its user can mend, for its ``main``.

    Args:
        name: The command's name, as errors begin with.
    """

    def decorate(main: Callable[_P, None]) -> Callable[_P, None]:
        @functools.wraps(main)
        def reporting(*args: _P.args, **options: _P.kwargs) -> None:
            try:
                main(*args, **options)
            except (MokaError, OSError) as error:
                told = str(error) if isinstance(error, MokaError) else system_failure(error)
                if told is None:
                    raise
                print(f"{name}: error: {told}", file=sys.stderr)
                sys.exit(2)

        return reporting

    return decorate


def positive_int(text: str) -> int:
    """The type of an option for a whole number from 1 on."""
    with contextlib.suppress(ValueError):
        if (number := int(text)) >= 1:
            return number
    raise argparse.ArgumentTypeError(f"give a whole number of at least 1, not {text}")


def positive_number(text: str) -> float:
    """The type of an option for a number above 0."""
    with contextlib.suppress(ValueError):
        if 0 < (number := float(text)) < math.inf:
            return number
    raise argparse.ArgumentTypeError(f"give a number above 0, not {text}")


def check_device(device: str) -> None:
    """Refuses a device that is not there, before anything is loaded.

    Args:
        device: The value of ``--device``: ``cpu``, ``cuda`` or ``gpu``, perhaps with an index.

    Raises:
        ConfigError: Naming it.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda", "gpu") or (index and not index.isdecimal()):
        raise ConfigError(f"--device {device}: unknown; choose cpu or a GPU")
    if kind == "cpu":
        return
    import torch

    if int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device {device}: there is no such CUDA device; choose cpu")


def device_name(device: str) -> str:
    """Name of the GPU, or of the processor with the number of threads that compute."""
    import torch

    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{_processor()} ({torch.get_num_threads()} threads)"


class Moment:
    """A moment on the host's clock and, where there is a GPU, in its queue: nobody waits for it.

    Args:
        device: Where the work is done.
    """

    def __init__(self, device: "torch.device") -> None:
        self._host = time.perf_counter()
        self._event: Any = None
        if device.type == "cuda":
            import torch

            self._event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def host_ms_since(self, earlier: "Moment") -> float:
        """Milliseconds of the host."""
        return 1e3 * (self._host - earlier._host)

    def gpu_ms_since(self, earlier: "Moment") -> float | None:
        """Milliseconds of the GPU, idle or not; waits until it has come here. None on a CPU."""
        if self._event is None:
            return None
        self._event.synchronize()
        return float(earlier._event.elapsed_time(self._event))

    def ms_since(self, earlier: "Moment") -> float:
        """Milliseconds that the work took: the GPU's where there is one."""
        found = self.gpu_ms_since(earlier)
        return self.host_ms_since(earlier) if found is None else found


def versions(*more: str) -> dict[str, str]:
    """Versions of Python, the installed ones of the packages that matter, and CUDA if this torch has it.

    Args:
        *more: Further packages.
    """
    import torch

    numbers = {"python": platform.python_version()}
    for package in (*_PACKAGES, *more):
        with contextlib.suppress(PackageNotFoundError):
            numbers[package] = version(package)
    if torch.version.cuda:
        numbers["cuda"] = torch.version.cuda
    return numbers


def write_atomically(file: Path, text: str) -> None:
    """Writes a file under another name and renames it; its folder is made if need be."""
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def write_json(file: Path, content: Any, indent: int | None = None) -> None:
    """Writes JSON; a file that is there is replaced only by a whole one.

    Args:
        file: The file.
        content: What JSON can hold, and paths.
        indent: Spaces of an indentation; None for one line.
    """
    write_atomically(file, json.dumps(content, indent=indent, ensure_ascii=False, default=os.fspath) + "\n")


def replace_section(text: str, new: str, begin: str, end: str) -> str:
    """Puts a new section between two markers of a page.

    Args:
        text: The page.
        new: The section.
        begin: The marker above it.
        end: The marker below it.

    Returns:
        The changed page.

    Raises:
        ConfigError: If the two markers are not there exactly once, in their order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ConfigError(f"needs one line {begin} and one line {end} below it, around the generated section")
    return f"{text.partition(begin)[0]}{begin}\n{new}\n{end}{text.partition(end)[2]}"


def first_line(error: BaseException) -> str:
    """Kind and first line of an error, shortened."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return textwrap.shorten(text, 160, placeholder=" …")


def structure(model: "PreTrainedModel") -> list[tuple[object, ...]]:
    """Names, types and numbers of hooks of all modules: what an adapter could have changed."""
    from moka_pl._compat import hook_count

    return [(name, type(module), hook_count(module)) for name, module in model.named_modules()]


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
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device) / 2**30
    with contextlib.suppress(OSError):
        line = re.search(r"^VmHWM:\s+(\d+) kB", (_PROCESS / "status").read_text(), re.MULTILINE)
        if line is not None:
            return int(line[1]) / 2**20
    from moka_pl.callbacks.throughput import peak_memory

    return peak_memory(device)


def free_memory() -> None:
    """Gives back what nothing refers to any more, the GPU's cached blocks included."""
    import gc

    import torch

    gc.collect()  # models and tracebacks have reference cycles
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _processor() -> str:
    try:  # Linux, where the platform module knows the architecture only
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine() or "CPU"
