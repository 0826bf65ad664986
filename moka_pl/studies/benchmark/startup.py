"""How long a fit takes from its command to its first step, part by part; ``scripts/startup.py`` runs it.

The command runs in a process of its own, in whose callbacks a clock takes the time; after the first step the
process ends at once.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import wraps
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.tables import render
from moka_pl.studies.common import Parser, one_line_errors

DESCRIPTION = """\
Measures how long a fit takes from its command to its first step, part by part.

    python scripts/startup.py --config configs/smollm2.yaml
    python scripts/startup.py --config configs/llama2.yaml --model.backbone.name llama2-7b \\
        --model.backbone.weights random --data.init_args.path sample --data.init_args.prompt chat

All arguments are those of 'python -m moka_pl fit'. The first run downloads and converts; measure the second.
"""

#: The parts, as they follow each other.
PARTS = (
    "imports",
    "parsing",
    "data",
    "model",
    "adapters",
    "trainer",
    "validation before training",
    "first step",
)
_BEGUN = "MOKA_PL_STARTUP_BEGUN"
#: Packages whose files take most of the imports' time.
_LARGE = ("torch", "sympy", "transformers", "scipy", "torchmetrics")


class Stopwatch:
    """Seconds by part; what is measured within another part is taken from that one."""

    parts: ClassVar[dict[str, float]] = {}
    last: ClassVar[float] = 0.0

    @classmethod
    def lap(cls, part: str) -> None:
        """Adds the time since the last lap to a part."""
        now = time.time()
        cls.parts[part] = cls.parts.get(part, 0.0) + now - cls.last
        cls.last = now


def timed(part: str, before: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a function whose time counts as one part, and what preceded it as another.

    Args:
        part: The function's part.
        before: The part of what preceded it.
        function: What to take the time of.
    """

    @wraps(function)
    def run(*args: Any, **options: Any) -> Any:
        Stopwatch.lap(before)
        try:
            return function(*args, **options)
        finally:
            Stopwatch.lap(part)

    return run


@one_line_errors("startup")
def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table and JSON.

    Args:
        arguments: Those of ``fit``, default those of the process.
    """
    parser = Parser("startup", DESCRIPTION)
    _, given = parser.parse_known_args(arguments)
    parts = measure(given)
    whole = sum(parts.values())
    lines = [[name, f"{parts.get(name, 0.0):.1f}", f"{parts.get(name, 0.0) / whole:.0%}"] for name in PARTS]
    print(render(["part", "seconds", "share"], [*lines, ["all", f"{whole:.1f}", ""]]))
    print(json.dumps(parts))
    if compiled := compiled_anew():
        print(
            f"Note: no bytecode of {', '.join(compiled)} is stored, so every process compiles it again. Run "
            "with PYTHONDONTWRITEBYTECODE unset; where the packages' folders cannot be written, with "
            "PYTHONPYCACHEPREFIX naming a folder that can."
        )


def compiled_anew(packages: Sequence[str] = _LARGE) -> list[str]:
    """Returns the installed packages of which Python finds no stored bytecode.

    Args:
        packages: Names to look at.
    """
    specs = {name: find_spec(name) for name in packages}
    return [name for name, spec in specs.items() if spec and not (spec.cached and Path(spec.cached).exists())]


def measure(arguments: Sequence[str]) -> dict[str, float]:
    """Runs a fit up to its first step.

    Args:
        arguments: Arguments of ``fit``.

    Returns:
        Seconds by part.

    Raises:
        ConfigError: If it ends before its first step.
    """
    command = [sys.executable, "-c", f"from {__name__} import run; run()", *arguments]
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "parts.json"
        where = [
            "--trainer.callbacks+=moka_pl.studies.benchmark.probe.Clock",
            f"--trainer.callbacks.file={answer}",
        ]
        where.append(f"--trainer.logger.init_args.save_dir={folder}")
        environment = os.environ | {_BEGUN: str(time.time())}
        status = subprocess.run([*command, *where], env=environment, stdout=sys.stderr).returncode
        if not answer.is_file():
            raise ConfigError(f"the fit ended with status {status} before its first step")
        parts: dict[str, float] = json.loads(answer.read_text(encoding="utf-8"))
    return parts


def run() -> None:
    """Runs a fit with the process's arguments, and takes the time; :func:`measure` starts this."""
    Stopwatch.last = float(os.environ[_BEGUN])
    from moka_pl.cli import lightning
    from moka_pl.training.module import MokaModule

    Stopwatch.lap("imports")
    for name, part, before in (("load_base", "model", "trainer"), ("_inject", "adapters", "model")):
        setattr(MokaModule, name, timed(part, before, getattr(MokaModule, name)))
    lightning.run(["fit", *sys.argv[1:]])
