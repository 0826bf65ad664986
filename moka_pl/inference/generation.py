"""Generates texts."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

#: Names of options in the LLM-Adapters format.
_OPTION = re.compile(r"\b(?:(?:answer|solution|ending|option) ?\d+|true|false)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Completion:
    """What a model has written behind a prompt.

    Attributes:
        text: The text, without special tokens.
        tokens: Number of generated tokens, the one that ends the turn included.
        stop_reason: Whether the turn was ended, or the text has the greatest length (``max_new_tokens``, or
            the model's context).
    """

    text: str
    tokens: int
    stop_reason: Literal["end_of_turn", "length"]


@torch.no_grad()
def complete(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    streamer: "BaseStreamer | None" = None,
    **options: Any,
) -> list[Completion]:
    """Completes some prompts in one batch, padded on the left.

    Greedily in float32, every prompt has the completion that it has alone.

    Args:
        model: A causal language model. It stops at the end tokens of its ``generation_config``.
        tokenizer: Its tokenizer.
        prompts: Tokens of each prompt.
        max_new_tokens: Most tokens to generate; fewer where the model's context ends before.
        streamer: Is given the tokens of a single prompt as they are generated.
        **options: What else transformers' ``generate`` takes, such as ``do_sample`` and ``top_p``.

    Returns:
        The completions, in the prompts' order.
    """
    width, padding = max(map(len, prompts)), tokenizer.pad_token_id
    ids = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    window = context_window(model)
    rooms = [max_new_tokens if window is None else min(max_new_tokens, window - len(p)) for p in prompts]
    full = [] if min(rooms) == max_new_tokens else [_full(rooms, width)]
    out = model.generate(
        input_ids=torch.tensor(ids, device=model.device),  # (I, T)
        attention_mask=torch.tensor(mask, device=model.device),  # (I, T)
        max_new_tokens=max_new_tokens,
        use_cache=True,
        pad_token_id=padding,
        streamer=streamer,
        stopping_criteria=full,
        **options,
    )
    rows = out[:, width:].tolist()
    ends = set(_ends(model))
    return [_completion(tokenizer, row[:room], ends) for row, room in zip(rows, rooms, strict=True)]


def context_window(model: "PreTrainedModel") -> int | None:
    """Returns the number of tokens that a model was made for, or None where it has no such bound."""
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return window if isinstance(window, int) and window > 0 else None


def _full(rooms: list[int], width: int) -> Callable[..., Tensor]:
    """Ends each prompt's completion where the context does, of all its beams as well."""

    def full(input_ids: Tensor, scores: Any, **options: Any) -> Tensor:
        room = torch.tensor(rooms, device=input_ids.device)
        room = room.repeat_interleave(len(input_ids) // len(rooms))  # (I · beams,)
        return input_ids.shape[1] - width >= room

    return full


def _ends(model: "PreTrainedModel") -> list[int]:
    own = None if model.generation_config is None else model.generation_config.eos_token_id
    return [] if own is None else list(own) if isinstance(own, list) else [int(own)]


def _completion(tokenizer: "PreTrainedTokenizerBase", row: list[int], ends: set[int]) -> Completion:
    """Cuts a row behind its first end token: what follows is padding, which may be the same token."""
    end = next((index for index, token in enumerate(row) if token in ends), None)
    tokens = row if end is None else row[: end + 1]
    text = str(tokenizer.decode(tokens, skip_special_tokens=True))
    return Completion(text, len(tokens), "length" if end is None else "end_of_turn")


@torch.no_grad()
def generate_texts(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    input_ids: Tensor,
    attention_mask: Tensor,
    max_new_tokens: int,
) -> list[str]:
    """Returns the greedy continuations of I prompts.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        input_ids: Prompts padded on the left, shape (I, T).
        attention_mask: 0 at the padding, shape (I, T).
        max_new_tokens: Maximum number of tokens to generate.
    """
    out = model.generate(
        input_ids=input_ids,
        attention_mask=attention_mask,
        max_new_tokens=max_new_tokens,
        num_beams=1,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        **GREEDY,
    )
    return list(tokenizer.batch_decode(out[:, input_ids.shape[1] :], skip_special_tokens=True))


#: Without sampling, a chat model's sampling settings would cause warnings.
GREEDY: dict[str, Any] = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}


def named_option(text: str) -> str:
    """Returns the first option that a text names, such as ``answer2`` or ``true``; empty if none."""
    match = _OPTION.search(text)
    return match[0].lower().replace(" ", "") if match else ""
