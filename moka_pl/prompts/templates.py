"""The texts around a question, the same in training and at inference; nothing heavy is imported here."""

from typing import TYPE_CHECKING, Literal

from moka_pl.errors import ConfigError, MokaError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptName = Literal["chat", "alpaca"]
"""The formats of an instruction or a chat."""

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


def chat_prompt(question: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns the chat template around one user turn, up to the answer.

    Raises:
        ConfigError: If the tokenizer has no chat template, or one that refuses the message.
        DataError: If the template does not come to an end.
    """
    from moka_pl.prompts.rendering import render_chat

    require_chat_template(tokenizer)
    try:
        return render_chat(tokenizer, [{"role": "user", "content": question}], prompt=True)
    except MokaError:
        raise
    except Exception as error:  # templates raise whatever they like
        raise ConfigError(
            "--prompt_format is chat, but the base model's chat template rejects a single user message: "
            f"{' '.join(str(error).split())}. Choose another format, such as alpaca or raw"
        ) from error


def require_chat_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ``ConfigError`` for a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ConfigError(
            "--prompt_format is chat, but the base model's tokenizer has no chat template; choose another, "
            "such as alpaca or raw"
        )
