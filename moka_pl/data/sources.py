"""What a user may give as ``path``: names, hub ids, files and folders, as a list of shards to read."""

import re
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moka_pl.data.catalog import CHOICE_TASKS, COMMONSENSE_170K, HubData, find_corpus, task_name
from moka_pl.data.formats.llm_adapters import SCIENCE
from moka_pl.data.readers import READERS, check_file, is_folder, path_exists, suffix_of
from moka_pl.data.samples import sample_path
from moka_pl.errors import DataError
from moka_pl.utils import expanded

SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "heldout", "eval"),
    "test": ("test", "testing"),
}
"""Words in the name of a file, or of a folder above it, that say which split it holds."""

HUB = "hub"
"""The path that means all eight commonsense tasks on the hub."""

_NO_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_INSTEAD = {"train": "train", "validation": "test", "test": "validation"}

Source = str | Path
Sources = Source | list[Source]


@dataclass(frozen=True)
class Shard:
    """One file, or one split of a hub dataset.

    Attributes:
        source: Path of the file, or id on the hub.
        split: Split on the hub.
        options: What else ``datasets.load_dataset`` is given (``name``, ``revision``, ...).
        context: What its records alone do not say, such as the task of multiple-choice questions.
        mixed: Whether its prompts may tell other tasks than its name, which says none of the eight.
    """

    source: Source
    split: str = "train"
    options: dict[str, Any] = field(default_factory=dict)
    context: str = ""
    mixed: bool = False


def as_list(sources: Sources) -> list[Source]:
    """Returns one source or several as a list.

    Raises:
        DataError: If the list is empty, or a source is no text.
    """
    listed = sources if isinstance(sources, list) else [sources]
    if not listed:
        raise DataError("the list of sources is empty. Give at least one")
    for source in listed:
        if not isinstance(source, str | Path) or not str(source).strip():
            raise DataError(f"a source of data is {source!r}. Give the path of a file or folder, or a name")
    return listed


def split_of(path: Path) -> str | None:
    """Returns the split that a relative path names, its last word first, such as ``data/test-0.csv``."""
    for name in (path.stem, *reversed(path.parts[:-1])):
        words = re.split(r"[^a-z]+", name.lower())
        for split, known in SPLIT_WORDS.items():
            if any(word in known for word in words):
                return split
    return None


def split_files(folder: Path, split: str) -> list[Path]:
    """Returns the data files of one split below a folder, sorted; files that name no split are training data.

    Hidden files and the hub's own info files are left out, and so are text files, which are more often notes.
    Where only one of validation and test exists it is both.

    Raises:
        DataError: The folder has no data files.
    """
    files: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        inner = path.relative_to(folder)
        hidden = any(part.startswith(".") for part in inner.parts)
        if suffix_of(path) and not path.is_dir() and not hidden and path.name not in _NO_DATA:
            check_file(path)  # a link to nowhere would be missed by nobody
            files.setdefault(split_of(inner) or "train", []).append(path)
    if not files:
        raise DataError(f"{folder} has no data files ({', '.join(READERS)}). Add one, or give another path")
    return files.get(split) or files.get(_INSTEAD[split]) or []


def find_shards(sources: Sources, split: str, hub_split: str | None = None) -> list[Shard]:
    """Returns the shards of one split of some sources; none unless every source has such a split.

    Args:
        sources: Short names of corpora, hub ids, files or folders.
        split: ``"train"``, ``"validation"`` or ``"test"``. A file is training data; a folder's files and a
            named corpus's splits are told apart.
        hub_split: A split of the hub to take instead.
    """
    return _joined([_shards(source, split, hub_split) for source in as_list(sources)])


def _joined(shards: list[list[Shard]]) -> list[Shard]:
    return [shard for part in shards for shard in part] if all(shards) else []


def _shards(source: Source, split: str, hub_split: str | None) -> list[Shard]:
    corpus = find_corpus(source)
    if corpus is not None:
        name = hub_split or corpus.splits.get(split)
        return [] if name is None else [Shard(corpus.hub, name, corpus.options)]
    folder = expanded(source)
    if is_folder(folder):
        return [Shard(path) for path in split_files(folder, split)]
    if hub_split is not None:
        return [Shard(source, hub_split)]
    return [Shard(source)] if split == "train" else []


def find_choice_shards(sources: Sources, split: str, wanted: list[str] | None) -> list[Shard]:
    """Returns the shards of one split of some multiple-choice sources; none unless every source has it.

    Args:
        sources: "sample", "hub", the name of one of the eight tasks or of commonsense_170k, a hub id, a file,
            a folder of one sub-folder per task, a folder of files of one task, or several of these.
        split: ``"train"``, ``"validation"`` or ``"test"``; where only one of the last two exists it is both.
        wanted: Read these tasks only, if they can be told before reading; None reads all.
    """
    return _joined([_choice_shards(source, split, wanted) for source in as_list(sources)])


def _choice_shards(source: Source, split: str, wanted: list[str] | None) -> list[Shard]:
    if source == "sample":
        return [Shard(sample_path("commonsense_train" if split == "train" else "commonsense_heldout"))]
    path = expanded(source)
    if is_folder(path):
        return _folder_shards(path, split, wanted)
    named = not isinstance(source, Path) and not path_exists(source)
    tasks = hub_tasks(source) if named else []
    if tasks:
        if wanted is not None:
            refuse_unknown(wanted, {task.name for task in tasks}, source)
        return [
            Shard(task.hub, task.splits[split], task.options, context=task.name)
            for task in tasks
            if wanted is None or task.name in wanted
        ]
    if split != "train":
        return []
    if named and source in ("commonsense_170k", COMMONSENSE_170K):
        return [Shard(COMMONSENSE_170K, context=SCIENCE, mixed=True)]
    return [_file_shard(source)]


def hub_tasks(source: Source) -> list[HubData]:
    """Returns the tasks that a short name, "hub" or a hub id means; none for anything else."""
    if not isinstance(source, str):
        return []
    if source == HUB:
        return list(CHOICE_TASKS.values())
    named = CHOICE_TASKS.get(task_name(source))
    return [named] if named is not None else [task for task in CHOICE_TASKS.values() if task.hub == source]


def refuse_unknown(wanted: list[str], known: Collection[str], source: object, kind: str = "task") -> None:
    """Raises ``DataError`` if a wanted task is not known, or if there are no tasks at all.

    Args:
        wanted: Names of tasks.
        known: The tasks that there are.
        source: What messages call the source.
        kind: What they call a task.
    """
    unknown = [task for task in wanted if task not in known]
    if unknown or not known:
        raise DataError(
            f"{source} has no {kind} {', '.join(map(repr, unknown)) or 'at all'}; it has: "
            f"{', '.join(sorted(known)) or 'none'}. Correct `{kind}s`"
        )


def _file_shard(source: Source) -> Shard:
    """Returns a file of the task that its folder or its own name says, else of its folder's name."""
    path = expanded(source).absolute()
    words = re.split(r"[_\-. ]", path.stem)
    # arc_easy_train, arc_easy, arc
    beginnings = ["_".join(words[:count]) for count in range(len(words), 0, -1)]
    known = [task_name(name) for name in (path.parent.name, *beginnings)]
    context = next((name for name in known if name in CHOICE_TASKS), path.parent.name)
    return Shard(source, context=context, mixed=context not in CHOICE_TASKS)


def _folder_shards(folder: Path, split: str, wanted: list[str] | None) -> list[Shard]:
    children = [child for child in sorted(folder.iterdir()) if not child.name.startswith(".")]
    if any(child.is_file() for child in children):
        files = split_files(folder, split)
        if split == "train" and not files:
            raise DataError(f"{folder}: no training file. Add a train.json, or give another path")
        return [_file_shard(file) for file in files]
    if not children:
        raise DataError(
            f"{folder} is empty. Give a folder with one sub-folder per task ({split}.json in each), or a file"
        )
    files_of = {
        child.name: split_files(child, split) if any(child.iterdir()) else []
        for child in children
        if wanted is None or task_name(child.name) in wanted
    }
    if missing := [name for name, files in files_of.items() if not files]:
        raise DataError(
            f"{folder}: no {'train' if split == 'train' else 'test'}.json in {', '.join(missing)}. Add it, "
            "or give a validation_path or a single file"
        )
    if not files_of:
        refuse_unknown(wanted or [], {task_name(child.name) for child in children}, folder)
    return [Shard(file, context=name) for name, files in files_of.items() for file in files]
