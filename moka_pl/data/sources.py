"""What a user may give as `path`: names, hub ids, files and folders, as a list of things to read."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moka_pl.data.catalog import find_corpus
from moka_pl.data.files import files_by_part
from moka_pl.errors_part import DataError

Source = str | Path
Sources = Source | list[Source]


@dataclass(frozen=True)
class Piece:
    """One file, or one split of a hub data set.

    Attributes:
        source: Path of the file, or id on the hub.
        split: Split on the hub.
        options: What else `datasets.load_dataset` is given.
    """

    source: Source
    split: str = "train"
    options: dict[str, Any] = field(default_factory=dict)


def as_list(sources: Sources) -> list[Source]:
    """One source or several as a list.

    Raises:
        DataError: The list is empty.
    """
    found = sources if isinstance(sources, list) else [sources]
    if not found:
        raise DataError("The list of files is empty. Give at least one.")
    return found


def find_pieces(sources: Sources, part: str, split: str | None = None) -> list[Piece]:
    """What holds `part` of some sources.

    Args:
        sources: Short names of corpora, hub ids, files or folders.
        part: `"train"`, `"validation"` or `"test"`. A file is training data; a folder's files and a named
            corpus's splits are told apart.
        split: A split of the hub to take instead.

    Returns:
        The pieces in the order of the sources; empty unless every source has such a part.

    Raises:
        DataError: A folder holds no data files.
    """
    pieces: list[Piece] = []
    for source in as_list(sources):
        found = _pieces(source, part, split)
        if not found:
            return []
        pieces += found
    return pieces


def _pieces(source: Source, part: str, split: str | None) -> list[Piece]:
    corpus = find_corpus(source)
    if corpus is not None:
        name = split or corpus.splits.get(part)
        return [] if name is None else [Piece(corpus.hub, name, corpus.options)]
    folder = Path(source).expanduser()
    if folder.is_dir():
        parts = files_by_part(folder)
        fallback = {"validation": "test", "test": "validation"}.get(part, part)
        return [Piece(path) for path in parts.get(part) or parts.get(fallback) or []]
    if split is not None:
        return [Piece(source, split)]
    return [Piece(source)] if part == "train" else []
