"""How a multiple-choice question is asked, and how its options continue the prompt."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from moka_pl.errors import DataError
from moka_pl.prompts.segments import Segment
from moka_pl.prompts.templates import cloze_prompt, letters_prompt, llm_adapters_names, llm_adapters_prompt

Row = Mapping[str, Any]


@dataclass(frozen=True)
class ChoicePrompt:
    """A form of multiple-choice questions, the same in training and evaluation.

    Attributes:
        before: The text before the options of a row.
        options: The texts that continue it, one for each option.
        names: For forms that are evaluated by generating: what the answer calls each option.
    """

    before: Callable[[Row], str]
    options: Callable[[Row], list[str]]
    names: Callable[[Row], list[str]] | None = None

    def segments(self, row: Row) -> list[Segment]:
        """Question and right option; the option and the end-of-sequence token are trained."""
        right = self.options(row)[row["answer"]]
        return [Segment(self.before(row), trained=False), Segment(right, trained=True, end=True)]


def texts(row: Row) -> list[str]:
    """The options' texts after `Answer:`."""
    return [f" {choice}" for choice in row["choices"]]


def letters(row: Row) -> list[str]:
    """The options' letters after `Answer:`.

    Raises:
        DataError: There are more options than letters.
    """
    count = len(row["choices"])
    if count > len(ascii_uppercase):
        raise DataError(
            f"{row['where']}: {count} choices, but there are only {len(ascii_uppercase)} letters for them. "
            "Use `prompt: cloze`."
        )
    return [f" {letter}" for letter in ascii_uppercase[:count]]


def _cloze(row: Row) -> str:
    return cloze_prompt(row["question"])


def _letters(row: Row) -> str:
    return letters_prompt(row["question"], row["choices"])


def _llm_adapters(row: Row) -> str:
    return llm_adapters_prompt(row["question"], row["choices"], row["task"])


def _names(row: Row) -> list[str]:
    return llm_adapters_names(row["choices"], row["task"])


def _sentences(row: Row) -> list[str]:
    return [f"the correct answer is {name}" for name in _names(row)]


CHOICE_PROMPTS: dict[str, ChoicePrompt] = {
    "cloze": ChoicePrompt(_cloze, texts),
    "letters": ChoicePrompt(_letters, letters),
    "llm_adapters": ChoicePrompt(_llm_adapters, _sentences, _names),
}
"""The forms by the name that options and adapters know them by."""


# Which prompt an evaluation uses: the adapter's own, unless the user chose another.


def resolve_prompt(
    chosen: str | None, trained: str | None, known: Collection[str], default: str, *, warned: set[str]
) -> str:
    """Settle the prompt of a data module.

    Args:
        chosen: What the user chose; None leaves it to the adapter.
        trained: The prompt that the adapter was trained with, if there is an adapter that tells.
        known: The prompts among which there is a choice; an adapter trained with any other decides nothing.
        default: The prompt where neither decides.
        warned: What has been warned of; the same warning is given once.

    Returns:
        The name of the prompt.
    """
    own = trained if trained in known else None
    if chosen is None:
        return own or default
    if own is not None and own != chosen and own not in warned:
        warned.add(own)
        rank_zero_warn(
            f"the adapter was trained with `prompt: {own}`, but the data are asked for with `prompt: "
            f"{chosen}`; leave the option out to use the adapter's own"
        )
    return chosen
