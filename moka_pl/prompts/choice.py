"""How a multiple-choice question is asked, and which prompt an evaluation uses.

The package's own scoring and the tasks of lm_eval take their texts from the same objects here.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from moka_pl.errors import DataError
from moka_pl.prompts.segments import Segment
from moka_pl.prompts.templates import PromptName, alpaca_prompt, cloze_prompt
from moka_pl.utils import warn

ChoicePromptName = Literal["cloze", "letters", "llm_adapters"]
"""The formats of a multiple-choice question: the names of ``CHOICE_PROMPTS``."""

PromptFormat = Literal[PromptName, ChoicePromptName, "raw"]
"""What may surround a question: the tokenizer's chat template, a training prompt, or nothing."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ChoicePrompt:
    """A format of multiple-choice questions, the same in training and evaluation.

    Attributes:
        before: The text before the options of a row.
        options: The texts that continue it, one for each option.
        asked: A question that somebody asks, without known options, in this format.
        names: For formats that are evaluated by generating: what the answer calls each option.
    """

    before: Callable[[Row], str]
    options: Callable[[Row], list[str]]
    asked: Callable[[str], str]
    names: Callable[[Row], list[str]] | None = None

    def segments(self, row: Row) -> list[Segment]:
        """Returns question and right option; the option and the end-of-sequence token are trained."""
        right = self.options(row)[row["answer"]]
        return [Segment(self.before(row), trained=False), Segment(right, trained=True, end=True)]

    def solved(self, row: Row) -> str:
        """Returns the question with its right option."""
        return self.before(row) + self.options(row)[row["answer"]]

    def bare_options(self, row: Row) -> list[str]:
        """Returns the options without the space that parts them from the prompt, which lm_eval adds."""
        return [option.removeprefix(" ") for option in self.options(row)]


def _mmlu(row: Row) -> str:
    """Returns a question, its options on lines of their own behind A., B., ..., and ``Answer:``."""
    options = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, row["choices"], strict=False)]
    return "\n".join([row["question"], *options, "Answer:"])


def _option_texts(row: Row) -> list[str]:
    return [f" {choice}" for choice in row["choices"]]


def _option_letters(row: Row) -> list[str]:
    count = len(row["choices"])
    if count > len(ascii_uppercase):
        raise DataError(
            f"{row['location']}: {count} choices, but there are only {len(ascii_uppercase)} letters for "
            "them. Use `prompt: cloze`"
        )
    return [f" {letter}" for letter in ascii_uppercase[:count]]


# What the LLM-Adapters corpora call the options of a task, and how they ask; the others have answers.
_LLM_ADAPTERS = {
    "piqa": ("solution", "Please choose the correct solution to the question"),
    "hellaswag": ("ending", "Please choose the correct ending to complete the given sentence"),
    "winogrande": (
        "option",
        "Please choose the correct answer to fill in the blank to complete the given sentence",
    ),
}
_LLM_ADAPTERS_OTHER = ("answer", "Please choose the correct answer to the question")


def _llm_adapters_words(row: Row) -> tuple[str, str]:
    task = row["task"].lower()
    return next((words for name, words in _LLM_ADAPTERS.items() if name in task), _LLM_ADAPTERS_OTHER)


def _llm_adapters_names(row: Row) -> list[str]:
    """Returns what LLM-Adapters calls the options: ``answer1``, ..., or ``true`` and ``false`` themselves."""
    if sorted(row["choices"]) == ["false", "true"]:
        return list(row["choices"])
    word, _ = _llm_adapters_words(row)
    return [f"{word}{number}" for number in range(1, len(row["choices"]) + 1)]


def _llm_adapters(row: Row) -> str:
    """Returns the LLM-Adapters format: the options are listed by name in an Alpaca instruction.

    The task decides between answer1, solution1 (piqa), ending1 (hellaswag) and option1 (winogrande). Options
    ``true`` and ``false`` are asked for without a list.
    """
    names = _llm_adapters_names(row)
    _, lead = _llm_adapters_words(row)
    listed = (f"{name.capitalize()}: {text}" for name, text in zip(names, row["choices"], strict=True))
    body = " ".join(listed) + "\n\n"
    if sorted(names) == ["false", "true"]:
        lead, body, names = (
            "Please answer the following question with true or false, question",
            "",
            sorted(names, reverse=True),
        )
    return alpaca_prompt(f"{lead}: {row['question']}\n\n{body}Answer format: {'/'.join(names)}")


def _llm_adapters_answers(row: Row) -> list[str]:
    return [f"the correct answer is {name}" for name in _llm_adapters_names(row)]


CHOICE_PROMPTS: dict[str, ChoicePrompt] = {
    "cloze": ChoicePrompt(lambda row: cloze_prompt(row["question"]), _option_texts, cloze_prompt),
    "letters": ChoicePrompt(lambda row: f"Question: {_mmlu(row)}", _option_letters, cloze_prompt),
    "llm_adapters": ChoicePrompt(_llm_adapters, _llm_adapters_answers, alpaca_prompt, _llm_adapters_names),
}
"""The formats by the name that options and adapters use."""

MMLU_PROMPTS: dict[str, ChoicePrompt] = {
    "letters": ChoicePrompt(_mmlu, _option_letters, cloze_prompt),
    "text": CHOICE_PROMPTS["cloze"],
}
"""MMLU's prompt by scoring."""


def mmlu_header(subject: str, *, listed: bool = True) -> str:
    """Returns the line that opens a prompt of MMLU, whose questions have their options listed or not."""
    kind = "multiple choice questions" if listed else "questions"
    return f"The following are {kind} (with answers) about {subject.replace('_', ' ')}."


@dataclass(frozen=True)
class FewShot:
    """MMLU's prompts: a header, solved questions, and the one that is asked.

    Attributes:
        scoring: A name of ``MMLU_PROMPTS``.
        solved: The solved questions of every task, as text.
    """

    scoring: str
    solved: Mapping[str, Sequence[str]]

    def prompt(self, row: Row, left_out: int = 0) -> str:
        """Returns the prompt with the solved questions of the row's task, all or without the first ones."""
        header = mmlu_header(row["task"].removeprefix("mmlu_"), listed=self.scoring == "letters")
        asked = MMLU_PROMPTS[self.scoring].before(row)
        return "\n\n".join([header, *self.solved.get(row["task"], ())[left_out:], asked])

    def shorter(self, row: Row) -> list[str]:
        """Returns the prompts with one more question left out each, from the front, down to none."""
        return [self.prompt(row, left_out) for left_out in range(1, len(self.solved[row["task"]]) + 1)]


def resolve_prompt(
    chosen: str | None, trained: str | None, known: Collection[str], default: str, *, warned: set[str]
) -> str:
    """Returns the name of the prompt of a data module: the adapter's, unless the user chose another.

    Args:
        chosen: What the user chose; None leaves it to the adapter.
        trained: The prompt that the adapter was trained with, if there is an adapter that tells.
        known: The prompts among which there is a choice; an adapter trained with any other decides nothing.
        default: The prompt where neither decides.
        warned: What has been warned of; the same warning is given once.
    """
    adapters = trained if trained in known else None
    if chosen is None:
        return adapters or default
    if adapters is not None and adapters != chosen and adapters not in warned:
        warned.add(adapters)
        warn(
            f"the adapter was trained with `prompt: {adapters}`, but the data use `prompt: {chosen}`; remove "
            "the option to use the adapter's prompt"
        )
    return chosen
