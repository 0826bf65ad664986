"""What an evaluation leaves: a JSON file as lm_eval writes it, with what was evaluated, and a table."""

import errno
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from moka_pl.adapters.reading import WEIGHTS_NAME
from moka_pl.errors import ConfigError
from moka_pl.utils import expanded, unwritable_reason
from moka_pl.version import __version__

#: The file is written under its name with a few characters more, and most systems take 255.
_LONGEST_NAME = 240

_LIBRARIES = ("lm_eval", "torch", "transformers", "bitsandbytes", "datasets")


def results_path(output: Path | None, folder: Path) -> Path:
    """Returns ``output``, or in a folder ``results_<time>.json`` (UTC); checked before anything is computed.

    Args:
        output: A file, or a folder that exists already; None takes ``folder``.
        folder: The folder to write to without ``output``.

    Raises:
        ConfigError: If nothing can be written there.
    """
    path = expanded(output) if output is not None else folder
    if output is None or path.is_dir():
        path = path / f"results_{datetime.now(UTC):%Y-%m-%dT%H-%M-%S}.json"
    if path.exists() and not _are_results(path):
        raise ConfigError(f"--output {path} is there already, and holds no results; choose another file")
    reason = unwritable_reason(path.parent)
    if reason is None and len(os.fsencode(path.name)) > _LONGEST_NAME:
        reason = os.strerror(errno.ENAMETOOLONG)
    if reason is not None:
        raise ConfigError(f"cannot write results to {path}: {reason}. Choose another file with --output")
    return path


def _are_results(path: Path) -> bool:
    """Whether a file is empty, or holds the results of an evaluation."""
    try:
        text = path.read_text(encoding="utf-8")
        stored = json.loads(text) if text.strip() else {"results": {}}
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(stored, dict) and "results" in stored


def write_results(results: Mapping[str, Any], path: Path) -> None:
    """Writes the results; a file that was there is replaced only once the new one is whole.

    Raises:
        ConfigError: If the disk is full or read-only.
    """
    from lm_eval.utils import handle_non_serializable

    text = json.dumps(results, indent=2, default=handle_non_serializable, ensure_ascii=False) + "\n"
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        scratch.unlink(missing_ok=True)
        raise ConfigError(f"cannot write results to {path}: {error.strerror or error}") from error


def versions() -> dict[str, str]:
    """Returns the versions of this package and of those that the numbers depend on."""
    known = {"moka_pl": __version__}
    for name in _LIBRARIES:
        with suppress(PackageNotFoundError):
            known[name] = version(name)
    return known


def weights_fingerprint(adapter: Path) -> str:
    """Returns a hash of an adapter's weights, 16 hexadecimal digits, which ties results to them."""
    return sha256((adapter / WEIGHTS_NAME).read_bytes()).hexdigest()[:16]
