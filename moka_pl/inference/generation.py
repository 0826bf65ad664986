"""Generates texts."""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Names of options in the LLM-Adapters format.
_OPTION = re.compile(r"\b(?:(?:answer|solution|ending|option) ?\d+|true|false)\b", re.IGNORECASE)


@torch.no_grad()
def generate_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
) -> list[str]:
    """Returns the continuations of I prompts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        input_ids: Prompts padded on the left, shape (I, T).
        attention_mask: 0 at the padding, shape (I, T).
        max_new_tokens: Maximum number of tokens to generate.
        temperature: Sampling temperature; 0 decodes greedily.
    """
    # Without sampling, a chat model's sampling settings would cause warnings.
    sampling = (
        {"temperature": temperature} if temperature else dict.fromkeys(("temperature", "top_p", "top_k"))
    )
    out = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
    return list(tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True))


def named_option(text: str) -> str:
    """Returns the first option that a text names, such as ``answer2`` or ``true``; empty if none."""
    match = _OPTION.search(text)
    return match[0].lower().replace(" ", "") if match else ""
