"""Instruction corpora by name: where each lies on the hub, its splits, and the prompt that fits it."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moka_pl.prompts.templates import PromptName


PARQUET = "refs/convert/parquet"
"""The hub's own Parquet copy of data sets whose main branch holds a script, which `datasets` runs no more."""


@dataclass(frozen=True)
class Corpus:
    """A corpus on the hub.

    Attributes:
        hub: Its id.
        prompt: The prompt that fits its records where the user names none.
        splits: Names of its train, validation and test splits; a part that is not in it does not exist.
        options: What `datasets.load_dataset` needs beside id and split (`name`, `revision`, `data_files`).
    """

    hub: str
    prompt: "PromptName" = "alpaca"
    splits: dict[str, str] = field(default_factory=lambda: {"train": "train"})
    options: dict[str, Any] = field(default_factory=dict)


CORPORA = {
    "alpaca": Corpus("tatsu-lab/alpaca"),
    "alpaca_cleaned": Corpus("yahma/alpaca-cleaned"),
    "dolly": Corpus("databricks/databricks-dolly-15k"),
    "flan": Corpus("Muennighoff/flan", splits={"train": "train", "validation": "validation", "test": "test"}),
    "guanaco": Corpus(
        "timdettmers/openassistant-guanaco", "chat", {"train": "train", "validation": "test", "test": "test"}
    ),
    "oasst1": Corpus(
        "OpenAssistant/oasst1",
        "chat",
        {"train": "train", "validation": "validation", "test": "validation"},
    ),
    "sharegpt": Corpus(
        "anon8231489123/ShareGPT_Vicuna_unfiltered",
        "chat",
        options={"data_files": "ShareGPT_V3_unfiltered_cleaned_split.json"},
    ),
    "ultrachat": Corpus(
        "HuggingFaceH4/ultrachat_200k",
        "chat",
        {"train": "train_sft", "validation": "test_sft", "test": "test_sft"},
    ),
}
"""Corpora by short name. Their columns are those of the forms that records are told apart by."""

_BY_HUB = {corpus.hub: corpus for corpus in CORPORA.values()}


def find_corpus(source: str | Path) -> Corpus | None:
    """The corpus of a short name (`alpaca`) or hub id (`tatsu-lab/alpaca`); None for anything else.

    A local file or folder of that name comes first: write `./alpaca` or nothing at all, both work.
    """
    if isinstance(source, Path) or Path(source).expanduser().exists():
        return None
    return CORPORA.get(source.lower().replace("-", "_")) or _BY_HUB.get(source)


# The eight commonsense tasks: their names, their place on the hub, and the form that all items get.
#
# The hub originals and the LLM-Adapters form give the same items. Where the latter tells less, both are
# brought to what it tells: BoolQ is asked without its passage, and HellaSwag's context is not capitalised
# where its second half begins (lm-evaluation-harness does so). BoolQ's questions end in one question mark;
# HellaSwag's marks in square brackets are taken out; the white space around every text is stripped.


_DEV = {"train": "train", "validation": "validation", "test": "validation"}
"""Splits of tasks whose test labels are not public: what others call their test set is the validation set."""
_ALL = {"train": "train", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class ChoiceTask:
    """A task on the hub.

    Attributes:
        name: Its name here.
        hub: Id of the hub data set.
        aliases: Other names that people have for it (lower case, with underscores).
        splits: Names of its train, validation and test splits.
        options: What `datasets.load_dataset` needs beside id and split.
    """

    name: str
    hub: str
    aliases: tuple[str, ...] = ()
    splits: dict[str, str] = field(default_factory=lambda: _DEV)
    options: dict[str, Any] = field(default_factory=dict)


_TASKS = (
    ChoiceTask("boolq", "google/boolq", ("bool_q",)),
    ChoiceTask("piqa", "ybisk/piqa", options={"revision": PARQUET}),
    ChoiceTask(
        "siqa",
        "allenai/social_i_qa",
        ("social_i_qa", "social_iqa", "socialiqa"),
        options={"revision": PARQUET},
    ),
    ChoiceTask("hellaswag", "Rowan/hellaswag", ("hella_swag",)),
    ChoiceTask(
        "winogrande",
        "allenai/winogrande",
        ("wino_grande", "winogrande_xl", "wino"),
        options={"name": "winogrande_xl"},
    ),
    ChoiceTask("arc_easy", "allenai/ai2_arc", ("arc_e",), _ALL, {"name": "ARC-Easy"}),
    ChoiceTask(
        "arc_challenge", "allenai/ai2_arc", ("arc_c", "arcchallenge"), _ALL, {"name": "ARC-Challenge"}
    ),
    ChoiceTask("openbookqa", "allenai/openbookqa", ("obqa", "open_book_qa"), _ALL, {"name": "main"}),
)
CHOICE_TASKS = {task.name: task for task in _TASKS}
"""The eight tasks by name, in the usual order."""

COMMONSENSE_170K = "zwhe99/commonsense_170k"
"""The LLM-Adapters training file with all eight tasks mixed, on the hub."""

_NAMES = {alias: task.name for task in _TASKS for alias in (task.name, *task.aliases)}
_MARKS = re.compile(r"\[.*?\]")


def task_name(name: str) -> str:
    """Our name of a task: `ARC-Easy` and `arc_e` are `arc_easy`; names of other tasks stay as they are."""
    return _NAMES.get(name.lower().replace("-", "_"), name)


def normalise(task: str, question: str, choices: list[str]) -> tuple[str, list[str]]:
    """Bring question and options of a task, from whichever form, to the form that all items have.

    Args:
        task: `task_name` of the task.
        question: As it stands in the hub's columns or in the LLM-Adapters prompt.
        choices: The options, in order.

    Returns:
        The question and the options.
    """
    clean: Callable[[str], str] = _without_marks if task == "hellaswag" else str.strip
    question = clean(question)
    if task == "boolq":
        question = question.rstrip("? ") + "?"
    return question, [clean(choice) for choice in choices]


def fill_blank(question: str, choices: list[str]) -> tuple[str, list[str]]:
    """Put WinoGrande's options into the blank of the sentence.

    Args:
        question: A sentence with a blank `_`.
        choices: What may stand in the blank.

    Returns:
        The sentence up to its blank, and the options with the rest of the sentence; what has no blank comes
        back as it is.
    """
    before, blank, after = question.partition("_")
    if not blank or not before.strip():
        return question, choices
    return before.rstrip(), [f"{choice.strip()}{after}" for choice in choices]


def _without_marks(text: str) -> str:
    """HellaSwag's WikiHow texts hold [header], [title], [step] and [substeps]."""
    text = _MARKS.sub("", text.strip().replace(" [title]", ". "))
    return re.sub(r" {2,}", " ", text).strip()
