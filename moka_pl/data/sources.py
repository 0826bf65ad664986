"""What a user may give as `path`: names, hub ids, files and folders, as a list of things to read."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moka_pl.data.catalog import CHOICE_TASKS, COMMONSENSE_170K, ChoiceTask, find_corpus, task_name
from moka_pl.data.formats.llm_adapters import SCIENCE
from moka_pl.data.samples import sample_path
from moka_pl.errors import DataError

# The data files of a folder, by the part of the data that their names say they hold.


SUFFIXES = (".json", ".jsonl", ".csv", ".parquet")
"""Kinds of files that are taken from a folder; a text file there is more often a note than data."""

PARTS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "heldout", "eval"),
    "test": ("test", "testing"),
}
"""Words in the name of a file, or of a folder above it, that say which part it holds."""

_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}


def files_by_split(folder: Path) -> dict[str, list[Path]]:
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
            parts.setdefault(split_of(inner) or "train", []).append(path)
    if not parts:
        raise DataError(
            f"{folder} holds no data file. Put {', '.join(SUFFIXES)} files into it, or give one of them."
        )
    return parts


def split_of(path: Path) -> str | None:
    """Which part a relative path names, its last word first: `data/test-00000.parquet` is `"test"`."""
    for name in (path.stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", name.lower())
        for part, known in PARTS.items():
            if any(word in known for word in words):
                return part
    return None


# What a user may give as `path`: names, hub ids, files and folders, as a list of things to read.


Source = str | Path
Sources = Source | list[Source]


@dataclass(frozen=True)
class Shard:
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


def find_shards(sources: Sources, part: str, split: str | None = None) -> list[Shard]:
    """What holds `part` of some sources.

    Args:
        sources: Short names of corpora, hub ids, files or folders.
        part: `"train"`, `"validation"` or `"test"`. A file is training data; a folder's files and a named
            corpus's splits are told apart.
        split: A split of the hub to take instead.

    Returns:
        The shards in the order of the sources; empty unless every source has such a part.

    Raises:
        DataError: A folder holds no data files.
    """
    shards: list[Shard] = []
    for source in as_list(sources):
        found = _shards(source, part, split)
        if not found:
            return []
        shards += found
    return shards


def _shards(source: Source, part: str, split: str | None) -> list[Shard]:
    corpus = find_corpus(source)
    if corpus is not None:
        name = split or corpus.splits.get(part)
        return [] if name is None else [Shard(corpus.hub, name, corpus.options)]
    folder = Path(source).expanduser()
    if folder.is_dir():
        parts = files_by_split(folder)
        fallback = {"validation": "test", "test": "validation"}.get(part, part)
        return [Shard(path) for path in parts.get(part) or parts.get(fallback) or []]
    if split is not None:
        return [Shard(source, split)]
    return [Shard(source)] if part == "train" else []


# What a user may give as `path` of multiple-choice questions, as a list of things to read.


HUB = "hub"
"""The path that means all eight tasks on the hub."""

_OTHER = {"train": "train", "validation": "test", "test": "validation"}


@dataclass(frozen=True)
class ChoiceShard(Shard):
    """One file, or one split of a hub data set, of multiple-choice questions.

    Attributes:
        context: Task of the records that do not name one.
        mixed: Whether its prompts may tell other tasks: its own name says none of the eight.
    """

    context: str = ""
    mixed: bool = False


def find_choice_shards(source: Source, part: str, wanted: list[str] | None) -> list[ChoiceShard]:
    """What holds `part` of a source.

    Args:
        source: "sample", "hub", the name of one of the eight tasks or of commonsense_170k, a hub id, a file,
            a folder of one sub-folder per task, or a folder of files of one task.
        part: `"train"`, `"validation"` or `"test"`; where only one of the last two exists it is both.
        wanted: Read these tasks only, where they can be told before reading; None reads all.

    Returns:
        The shards; none for the evaluation of a file or of a hub data set without such splits.

    Raises:
        DataError: A folder lacks a file, or none of its tasks is wanted.
    """
    if source == "sample":
        return [ChoiceShard(sample_path("commonsense_train" if part == "train" else "commonsense_heldout"))]
    path = Path(source).expanduser()
    if path.is_dir():
        return _folder(path, part, wanted)
    tasks = [] if isinstance(source, Path) or path.exists() else hub_tasks(source)
    if tasks:
        names = [task.name for task in tasks if wanted is None or task.name in wanted]
        if wanted is not None:
            refuse_unknown(wanted, {task.name for task in tasks}, source)
        return [_on_hub(CHOICE_TASKS[name], part) for name in names]
    if part != "train":
        return []
    if isinstance(source, str) and source in ("commonsense_170k", COMMONSENSE_170K) and not path.exists():
        return [ChoiceShard(COMMONSENSE_170K, context=SCIENCE, mixed=True)]
    return [_file(source, path)]


def hub_tasks(source: Source) -> list[ChoiceTask]:
    """The tasks that a short name, "hub" or a hub id means; none for anything else."""
    if not isinstance(source, str):
        return []
    if source == HUB:
        return list(CHOICE_TASKS.values())
    named = CHOICE_TASKS.get(task_name(source))
    return [named] if named is not None else [task for task in CHOICE_TASKS.values() if task.hub == source]


def context_of(path: Path) -> str:
    """The task that a file is of: the one its folder or its own name says, else its folder's name."""
    words = re.split(r"[_\-. ]", path.stem)
    own = ["_".join(words[:count]) for count in range(len(words), 0, -1)]  # arc_easy_train, arc_easy, arc
    known = [task_name(name) for name in (path.parent.name, *own)]
    return next((name for name in known if name in CHOICE_TASKS), path.parent.name)


def refuse_unknown(wanted: list[str], known: set[str], source: object) -> None:
    """Refuse tasks that a source does not have.

    Raises:
        DataError: One of the wanted tasks is not known, or there are no tasks at all.
    """
    unknown = [task for task in wanted if task not in known]
    if unknown or not known:
        raise DataError(
            f"{source} has no task {', '.join(map(repr, unknown)) or 'at all'}; it has: "
            f"{', '.join(sorted(known)) or 'no sub-folders'}. Correct `tasks`."
        )


def _on_hub(task: ChoiceTask, part: str) -> ChoiceShard:
    return ChoiceShard(task.hub, task.splits[part], task.options, context=task.name)


def _file(source: Source, path: Path) -> ChoiceShard:
    context = context_of(path.absolute())
    return ChoiceShard(source, context=context, mixed=context not in CHOICE_TASKS)


def _folder(folder: Path, part: str, wanted: list[str] | None) -> list[ChoiceShard]:
    children = sorted(folder.iterdir())
    tasks = [child for child in children if child.is_dir() and not child.name.startswith(".")]
    if any(child.is_file() and not child.name.startswith(".") for child in children):
        files = files_by_split(folder)
        found = files.get(part) or files.get(_OTHER[part]) or []
        if part == "train" and not found:
            raise DataError(f"{folder}: no training file. Add a train.json, or give another path.")
        return [_file(file, file) for file in found]
    if not tasks:
        raise DataError(
            f"{folder} has no sub-folders. Give a folder with one sub-folder per task ({part}.json in each), "
            "or a file."
        )
    shards: list[ChoiceShard] = []
    missing = []
    for child in tasks:
        if wanted is not None and task_name(child.name) not in wanted:
            continue
        files = files_by_split(child) if any(child.iterdir()) else {}
        found = files.get(part) or files.get(_OTHER[part]) or []
        if not found:
            missing.append(child.name)
        shards += [ChoiceShard(file, context=child.name) for file in found]
    if missing:
        name = "train" if part == "train" else "test"
        raise DataError(
            f"{folder}: no {name}.json in {', '.join(missing)}. Add it, or give a validation_path or a "
            "single file."
        )
    if not shards:
        refuse_unknown(wanted or [], {task_name(child.name) for child in tasks}, folder)
    return shards
