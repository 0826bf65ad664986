"""The data files of a folder, by the part of the data that their names say they hold."""

import re
from pathlib import Path

from moka_pl.errors_part import DataError

SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""Kinds of files that are taken from a folder; a text file there is more often a note than data."""

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "heldout", "eval"),
    "test": ("test", "testing"),
}
"""Words in the name of a file, or of a folder above it, that say which part it holds."""

_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def files_by_part(folder: Path) -> dict[str, list[Path]]:
    """The data files below `folder`, sorted, by part; files that name no part are training data.

    Args:
        folder: A folder of .json, .jsonl, .csv or .parquet files, for instance a downloaded hub data set
            (`data/train-00000-of-00002.parquet`). Hidden files and the hub's own info files are left out.

    Returns:
        `"train"`, `"validation"` and `"test"`, as far as there are files.

    Raises:
        DataError: There is no data file.
    """
    parts: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if path.suffix.lower() in SUFFIXES and path.is_file() and not hidden and path.name not in _NO_DATA:
            parts.setdefault(part_of(inner) or "train", []).append(path)
    if not parts:
        raise DataError(
            f"{folder} holds no data file. Put {', '.join(SUFFIXES)} files into it, or give one of them."
        )
    return parts


def part_of(path: Path) -> str | None:
    """Which part a relative path names, its last word first: `data/test-00000.parquet` is `"test"`."""
    for name in (path.stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", name.lower())
        for part, known in PARTS.items():
            if any(word in known for word in words):
                return part
    return None
