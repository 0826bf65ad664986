"""Answers by greedy generation, and whether they name the right option."""

import re
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NAMED = re.compile(r"\b(?:(?:answer|solution|ending|option) ?\d+|true|false)\b", re.IGNORECASE)
"""What the LLM-Adapters form calls an option."""


def named_option(text: str) -> str:
    """The first option that a text names, such as `answer2` or `true`; empty where it names none."""
    found = NAMED.search(text)
    return found[0].lower().replace(" ", "") if found else ""


@torch.no_grad()
def generate_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
) -> list[str]:
    """Continues prompts greedily.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        input_ids: Prompts padded on the left, shape (I, T).
        attention_mask: 0 at the padding, shape (I, T).
        max_new_tokens: Most tokens of a continuation.

    Returns:
        The I continuations.
    """
    out = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        # A chat model's own settings of sampling do not belong here.
        temperature=None,
        top_p=None,
        top_k=None,
    )
    return list(tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True))
