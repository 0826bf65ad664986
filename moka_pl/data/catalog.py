"""Corpora and tasks by name: where each lies on the hub, its splits, and what fits it.

The eight commonsense tasks give the same items from their hub originals and from the LLM-Adapters format.
Where the latter tells less, both are brought to what it tells: BoolQ is asked without its passage, and
HellaSwag's context is not capitalised where its second half begins (lm-evaluation-harness does so). BoolQ's
questions end in one question mark; HellaSwag's marks in square brackets are taken out; the white space around
every text is stripped.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moka_pl.data.readers import path_exists
from moka_pl.prompts.templates import PromptName

PARQUET = "refs/convert/parquet"
"""The hub's Parquet copy of datasets whose main branch holds a script, which ``datasets`` no longer runs."""

_ALL = {"train": "train", "validation": "validation", "test": "test"}
_NO_TEST = {"train": "train", "validation": "validation", "test": "validation"}
"""Splits of data without public test labels, whose validation set commonly serves as the test set."""


@dataclass(frozen=True)
class HubData:
    """A dataset on the hub: a corpus of instructions or chats, or a task of multiple-choice questions.

    Attributes:
        hub: Its id.
        splits: Names of its train, validation and test splits; one that is not in it does not exist.
        options: What ``datasets.load_dataset`` needs beside id and split (``name``, ``revision``,
            ``data_files``).
        name: The task's name here.
        aliases: Other names that people have for the task (lower case, with underscores).
        prompt: The prompt that fits the corpus's records where the user names none.
    """

    hub: str
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train"})
    options: dict[str, Any] = field(default_factory=dict)
    name: str = ""
    aliases: tuple[str, ...] = ()
    prompt: PromptName = "alpaca"


CORPORA = {
    "alpaca": HubData("tatsu-lab/alpaca"),
    "alpaca_cleaned": HubData("yahma/alpaca-cleaned"),
    "dolly": HubData("databricks/databricks-dolly-15k"),
    "flan": HubData("Muennighoff/flan", _ALL),
    "guanaco": HubData(
        "timdettmers/openassistant-guanaco",
        {"train": "train", "validation": "test", "test": "test"},
        prompt="chat",
    ),
    "oasst1": HubData("OpenAssistant/oasst1", _NO_TEST, prompt="chat"),
    "sharegpt": HubData(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        options={"data_files": "ShareGPT_V3_unfiltered_cleaned_split.json"},
        prompt="chat",
    ),
    "ultrachat": HubData(
        "HuggingFaceH4/ultrachat_200k",
        {"train": "train_sft", "validation": "test_sft", "test": "test_sft"},
        prompt="chat",
    ),
}
"""Corpora by short name; their columns identify their formats."""

_TASKS = (
    HubData("google/boolq", _NO_TEST, name="boolq", aliases=("bool_q",)),
    HubData("ybisk/piqa", _NO_TEST, {"revision": PARQUET}, "piqa"),
    HubData(
        "allenai/social_i_qa",
        _NO_TEST,
        {"revision": PARQUET},
        "siqa",
        ("social_i_qa", "social_iqa", "socialiqa"),
    ),
    HubData("Rowan/hellaswag", _NO_TEST, name="hellaswag", aliases=("hella_swag",)),
    HubData(
        "allenai/winogrande",
        _NO_TEST,
        {"name": "winogrande_xl"},
        "winogrande",
        ("wino_grande", "winogrande_xl", "wino"),
    ),
    HubData("allenai/ai2_arc", _ALL, {"name": "ARC-Easy"}, "arc_easy", ("arc_e",)),
    HubData("allenai/ai2_arc", _ALL, {"name": "ARC-Challenge"}, "arc_challenge", ("arc_c", "arcchallenge")),
    HubData("allenai/openbookqa", _ALL, {"name": "main"}, "openbookqa", ("obqa", "open_book_qa")),
)
CHOICE_TASKS = {task.name: task for task in _TASKS}
"""The eight tasks by name, in the usual order."""

COMMONSENSE_170K = "zwhe99/commonsense_170k"
"""The LLM-Adapters training file with all eight tasks mixed, on the hub."""

_NAMES = {alias: task.name for task in _TASKS for alias in (task.name, *task.aliases)}
_MARKS = re.compile(r"\[.*?\]")


def find_corpus(source: str | Path) -> HubData | None:
    """Returns the corpus of a short name or hub id; None for anything else.

    A local file or folder of that name comes first.
    """
    if isinstance(source, Path) or path_exists(source):
        return None
    by_hub = {corpus.hub: corpus for corpus in CORPORA.values()}
    return CORPORA.get(source.lower().replace("-", "_")) or by_hub.get(source)


def task_name(name: str) -> str:
    """Returns our name of a task: ``ARC-Easy`` is ``arc_easy``; names of other tasks stay as they are."""
    return _NAMES.get(name.lower().replace("-", "_"), name)


def normalise(task: str, question: str, choices: list[str]) -> tuple[str, list[str]]:
    """Brings question and options of a task, from whichever format, to the wording that all items have.

    Args:
        task: ``task_name`` of the task.
        question: As it stands in the hub's columns or in the LLM-Adapters prompt.
        choices: The options, in order.
    """
    clean: Callable[[str], str] = _without_marks if task == "hellaswag" else str.strip
    question = clean(question)
    if task == "boolq":
        question = question.rstrip("? ") + "?"
    return question, [clean(choice) for choice in choices]


def fill_blank(question: str, choices: list[str]) -> tuple[str, list[str]]:
    """Puts WinoGrande's options into the blank ``_`` of the sentence.

    Returns the sentence up to its blank, and the options with its rest; without a blank, both unchanged.
    """
    before, blank, after = question.partition("_")
    if not blank or not before.strip():
        return question, choices
    return before.rstrip(), [f"{choice.strip()}{after}" for choice in choices]


def _without_marks(text: str) -> str:
    """Takes out the [header], [title], [step] and [substeps] of HellaSwag's WikiHow texts."""
    # Only up to a line's last closing bracket: each opening one after it would be followed to the line's end.
    lines = [line.rpartition("]") for line in text.strip().replace(" [title]", ". ").split("\n")]
    text = "\n".join(_MARKS.sub("", before + end) + after for before, end, after in lines)
    return re.sub(r" {2,}", " ", text).strip()
