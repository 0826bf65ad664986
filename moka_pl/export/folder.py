"""The folder that an export writes: refused where it holds something else, whole or not there."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from moka_pl.adapters.reading import CONFIG_NAME
from moka_pl.errors import ConfigError
from moka_pl.utils import (
    existing_folder,
    expanded,
    replaced_folder,
    space_shortage,
    sync_file,
    unwritable_reason,
    write_failure,
)
from moka_pl.version import __version__

#: Names of files that exports write; a folder with others is never replaced.
_WRITTEN = re.compile(
    r"(adapter_config|config|preprocessor_config|generation_config|tokenizer\w*|special_tokens_map|added_tokens|vocab)\.json"
    r"|(adapter_model|adapters|model|model-\d+-of-\d+)\.safetensors|model\.safetensors\.index\.json"
    r"|merges\.txt|chat_template\.jinja|tokenizer\.model|(adapter|model-\w+)\.gguf|Modelfile"
)
#: What exports say of themselves in the head of a safetensors file, and in a comment of a Modelfile.
MARK = "moka_pl_version"


def marked(form: str) -> dict[str, str]:
    """Returns what a safetensors file of an export says of itself, in a format such as ``pt``."""
    return {"format": form, MARK: __version__}


def check_output(out: Path, adapter: Path, overwrite: bool, base: str = "") -> None:
    """Refuses a folder that may not be written, before any work.

    Args:
        out: The folder to write.
        adapter: The adapter directory.
        overwrite: Whether an older export may be replaced.
        base: Name, folder or file of the base.

    Raises:
        ConfigError: If ``out`` is a file, the adapter, the base, or not empty; with ``overwrite``, if it
            holds anything but an older export; or if nothing can be written there.
    """
    if out.exists() and not out.is_dir():
        raise ConfigError(f"--out {out} is a file; give a folder")
    if out.exists() and any(out.iterdir()):
        if base and expanded(base).exists() and expanded(base).resolve().is_relative_to(out.resolve()):
            raise ConfigError(
                f"--out {out} holds the base {base}, which is never replaced; choose another folder"
            )
        _check_replaceable(out, adapter, overwrite)
    if (reason := unwritable_reason(existing_folder(out.absolute().parent))) is not None:
        raise ConfigError(f"--out {out}: cannot write there ({reason}); choose another folder")


def check_space(out: Path, size: int) -> None:
    """Refuses an export that is larger than the free space of its disk, before it is begun.

    Args:
        out: The folder to write; an older export in it stays until the new one is complete.
        size: Bytes that are written, with what the export is compared with.

    Raises:
        ConfigError: Naming what is needed and what is free.
    """
    if (shortage := space_shortage(out.parent, size)) is not None:
        raise ConfigError(f"--out {out}: {shortage}; free some space, or choose a folder on another disk")


def _check_replaceable(out: Path, adapter: Path, overwrite: bool) -> None:
    """Refuses a folder that is not empty, unless it is to be replaced and holds an older export alone."""
    if out.resolve() == adapter.resolve() or _is_trained(out):
        raise ConfigError(
            f"--out {out} holds a trained adapter, which is never replaced; choose another folder"
        )
    if not overwrite:
        raise ConfigError(f"--out {out} is not empty; choose another folder, or add --overwrite")
    entries = sorted(entry.name for entry in out.iterdir())
    foreign = [name for name in entries if not _WRITTEN.fullmatch(name) or not (out / name).is_file()]
    if foreign:
        raise ConfigError(
            f"--out {out} holds {foreign[0]}, which no export writes, and is not replaced; "
            "choose another folder"
        )
    telling = [name for name in entries if name.endswith((".safetensors", "Modelfile"))] or entries[:1]
    if (unmarked := next((name for name in telling if not _is_marked(out / name)), None)) is not None:
        raise ConfigError(
            f"--out {out} holds {unmarked}, which does not say that an export of moka_pl wrote it, and is "
            "not replaced; choose another folder, or remove this one"
        )


def _is_marked(file: Path) -> bool:
    """Whether a safetensors file or a Modelfile is an export's."""
    try:
        if file.name == "Modelfile":
            return f"# {MARK}" in file.read_text(encoding="utf-8")
        with safe_open(file, framework="pt") as opened:
            return MARK in (opened.metadata() or {})
    except (OSError, ValueError, SafetensorError):
        return False


def _is_trained(folder: Path) -> bool:
    """Whether a folder holds an adapter that this package trained."""
    try:
        stored = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and "moka_pl_version" in stored


def mebibytes(out: Path) -> float:
    """Returns the size of what an export has written."""
    return sum(file.stat().st_size for file in out.iterdir()) / 2**20


@contextmanager
def written_folder(out: Path) -> Iterator[Path]:
    """Gives a new folder to fill, which takes the place of ``out`` unless the body fails.

    Raises:
        ConfigError: If the disk is full or cannot be written; nothing is left behind.
    """
    try:
        with replaced_folder(out) as new:
            new.mkdir()
            yield new
            for file in new.iterdir():
                sync_file(file)
    except OSError as error:
        reason = write_failure(error, out.parent)
        raise ConfigError(f"cannot write to --out {out}: {reason}; nothing was left there") from error
