"""The texts around a question, the same in training and at inference; nothing heavy is imported here."""

from collections.abc import Sequence
from string import ascii_uppercase
from typing import TYPE_CHECKING, Literal

from moka_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptName = Literal["chat", "alpaca"]
"""The formats of an instruction or a chat."""

ChoicePromptName = Literal["cloze", "letters", "llm_adapters"]
"""The formats of a multiple-choice question."""

PromptFormat = Literal[PromptName, ChoicePromptName, "raw"]
"""What may stand around a question: the tokenizer's chat template, a training prompt, or nothing."""

_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


def alpaca_prompt(instruction: str, context: str = "") -> str:
    """Returns the Alpaca prompt up to the answer; without a context in the format that has no input."""
    # Replaced one by one: a brace in the user's text is no place holder.
    template = _ALPACA_INPUT if context else _ALPACA
    before, _, rest = template.partition("{instruction}")
    return before + instruction + rest.replace("{input}", context)


def cloze_prompt(question: str) -> str:
    """Returns what stands before every option of a multiple-choice question."""
    return f"Question: {question}\nAnswer:"


def lettered(question: str, choices: Sequence[str]) -> str:
    """Returns a question, its options behind the letters A., B., ... on lines of their own, and the cue."""
    options = [f"{letter}. {choice}" for letter, choice in zip(ascii_uppercase, choices, strict=False)]
    return "\n".join([question, *options, "Answer:"])


def letters_prompt(question: str, choices: Sequence[str]) -> str:
    """Returns what stands before the letter of the right option."""
    return f"Question: {lettered(question, choices)}"


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


def llm_adapters_names(choices: Sequence[str], task: str) -> list[str]:
    """Returns what LLM-Adapters calls the options: ``answer1``, ..., or ``true`` and ``false`` themselves."""
    if sorted(choices) == ["false", "true"]:
        return list(choices)
    word, _ = _llm_adapters_words(task)
    return [f"{word}{number}" for number in range(1, len(choices) + 1)]


def llm_adapters_prompt(question: str, choices: Sequence[str], task: str) -> str:
    """Returns the LLM-Adapters format: the options are listed by name in an Alpaca instruction.

    Args:
        question: The question alone.
        choices: The texts of the options.
        task: Name of the task, which decides between answer1, solution1 (piqa), ending1 (hellaswag) and
            option1 (winogrande). Options ``true`` and ``false`` are asked for without a list.
    """
    names = llm_adapters_names(choices, task)
    if sorted(choices) == ["false", "true"]:
        lead, body, names = (
            "Please answer the following question with true or false, question",
            "",
            sorted(names, reverse=True),
        )
    else:
        _, lead = _llm_adapters_words(task)
        listed = (f"{name.capitalize()}: {text}" for name, text in zip(names, choices, strict=True))
        body = " ".join(listed) + "\n\n"
    return alpaca_prompt(f"{lead}: {question}\n\n{body}Answer format: {'/'.join(names)}")


def _llm_adapters_words(task: str) -> tuple[str, str]:
    return next((words for name, words in _LLM_ADAPTERS.items() if name in task.lower()), _LLM_ADAPTERS_OTHER)


def mmlu_header(subject: str, *, listed: bool = True) -> str:
    """Returns the line that opens a prompt of MMLU.

    Args:
        subject: Its name with underscores, such as ``high_school_physics``.
        listed: Whether the options are listed under the questions.
    """
    kind = "multiple choice questions" if listed else "questions"
    return f"The following are {kind} (with answers) about {subject.replace('_', ' ')}."


def chat_prompt(question: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the chat template around one user turn, up to the answer.

    Raises:
        ConfigError: If the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            "the prompt format is chat, but the base model's tokenizer has no chat template; choose another "
            "one by --prompt_format, such as alpaca or raw"
        )
    chat = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
