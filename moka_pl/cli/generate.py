"""``moka-pl generate``: an answer from a base model with its adapter."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from moka_pl.errors import ConfigError
from moka_pl.prompts.choice import CHOICE_PROMPTS, PromptFormat
from moka_pl.prompts.ends import prompt_ids
from moka_pl.prompts.templates import alpaca_prompt, chat_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def generate(
    adapter: Path,
    prompt: str,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    compare: bool = False,
    base: str | None = None,
    prompt_format: PromptFormat | None = None,
) -> None:
    """Generate an answer to a prompt with a trained adapter.

    Args:
        adapter: An adapter directory.
        prompt: The user's message; prompt_format wraps it.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 decodes greedily.
        compare: Also print the frozen base model's answer.
        base: Name or path of the base model. Default: the one stored with the adapter.
        prompt_format: Template for the prompt: chat (the tokenizer's chat template), alpaca (also
            llm_adapters), cloze ("Question: … Answer:"; also letters, with the options in the prompt) or raw
            (none). Default: the adapter's training prompt, else chat if the tokenizer has a template, else
            raw.
    """
    if not prompt:
        raise ConfigError("prompt is empty; give some text")
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ConfigError(f"temperature must be at least 0 and finite, not {temperature}")
    _check_format(prompt_format, "prompt_format")
    import torch

    from moka_pl.adapters import adapters_disabled, read_adapter
    from moka_pl.inference import generate_texts, load_model

    trained = read_adapter(adapter).extra.get("prompt")
    if prompt_format is None:
        prompt_format = trained
        _check_format(prompt_format, f"{adapter} was trained with an unknown prompt; --prompt_format")
    model, tokenizer = load_model(adapter, base=base)
    chosen = prompt_format or ("chat" if tokenizer.chat_template else "raw")
    ids = prompt_ids(tokenizer, _around(prompt, chosen, tokenizer), chosen, chosen == trained)
    if not ids:
        raise ConfigError(f"prompt has no token for the tokenizer of {adapter}; give another text")
    input_ids = torch.tensor([ids], device=model.device)

    def answer() -> str:
        mask = torch.ones_like(input_ids)
        return generate_texts(model, tokenizer, input_ids, mask, max_new_tokens, temperature)[0]

    if compare:
        with adapters_disabled(model):
            print(f"[base] {answer()}\n")
        print(f"[adapted] {answer()}")
    else:
        print(answer())


def _check_format(value: Any, name: str) -> None:
    known = get_args(PromptFormat)
    if value is not None and value not in known:
        raise ConfigError(f"{name} must be one of {', '.join(known)}, not {value!r}")


def _around(prompt: str, prompt_format: PromptFormat, tokenizer: "PreTrainedTokenizerBase") -> str:
    """The text that the model is to continue."""
    if prompt_format == "chat":
        return chat_prompt(prompt, tokenizer)
    if prompt_format == "alpaca":
        return alpaca_prompt(prompt)
    return prompt if prompt_format == "raw" else CHOICE_PROMPTS[prompt_format].asked(prompt)
