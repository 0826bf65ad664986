"""Where prompts begin and answers end, the same in training and at inference."""

from typing import TYPE_CHECKING

from moka_pl.prompts.rendering import ANSWER, QUESTION, SYSTEM, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_tails: dict[tuple[str, str], str | None] = {}


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer by itself puts its beginning-of-sequence token before a text."""
    if tokenizer.bos_token_id is None:
        return False
    # Around some text: a tokenizer may put the same token at the end.
    special, plain = (list(tokenizer("a", add_special_tokens=added).input_ids) for added in (True, False))
    return special[:1] == [tokenizer.bos_token_id] and not (plain and special[: len(plain)] == plain)


def template_tail(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    """Returns what the chat template writes after the text of an answer.

    None where there is no template, or none that renders a question with its answer.
    """
    if not tokenizer.chat_template:
        return None
    key = (str(tokenizer.chat_template), str(tokenizer.special_tokens_map))
    if key not in _tails:
        _tails[key] = _tail(tokenizer)
    return _tails[key]


def template_ends(tokenizer: "PreTrainedTokenizerBase") -> list[int] | None:
    """Returns the end-of-turn tokens: those that the chat template writes after the text of an answer.

    None where that is unknown (see ``template_tail``).
    """
    tail = template_tail(tokenizer)
    if tail is None:
        return None
    added = tokenizer.added_tokens_decoder
    ids = tokenizer(tail, add_special_tokens=False).input_ids
    return list(dict.fromkeys(one for one in ids if one in added and added[one].content.strip()))


def _tail(tokenizer: "PreTrainedTokenizerBase") -> str | None:
    for before in ([], [SYSTEM]):
        try:
            text = render_chat(tokenizer, [*before, QUESTION, ANSWER], prompt=False)
        except Exception:  # templates raise whatever they like
            continue
        _, answer, tail = text.rpartition(ANSWER["content"])
        return tail if answer else None
    return None


def end_tokens(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Returns every token that may end an answer in training: the tokenizer's own, and the template's."""
    own = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    return list(dict.fromkeys([*own, *(template_ends(tokenizer) or [])]))


def opening_id(tokenizer: "PreTrainedTokenizerBase") -> int | None:
    """Returns the token that opens plain texts: the beginning-of-sequence token, else that of the end."""
    known = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    return next((int(one) for one in known if one is not None), None)


def prompt_ids(
    tokenizer: "PreTrainedTokenizerBase", text: str, prompt_format: str, is_trained: bool
) -> list[int]:
    """Returns the tokens of a prompt, as training has them.

    Args:
        tokenizer: A tokenizer with which ``open_prompts`` was called.
        text: The prompt.
        prompt_format: How it is written: a chat template writes the special tokens itself.
        is_trained: Whether the adapter was trained with this format; raw texts then have an opening token,
            which is not every tokenizer's habit.
    """
    ids = list(tokenizer(text, add_special_tokens=prompt_format != "chat").input_ids)
    opening = opening_id(tokenizer)
    if prompt_format == "raw" and is_trained and opening is not None and ids[:1] != [opening]:
        ids.insert(0, opening)
    return ids


def open_prompts(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Has a tokenizer put what training puts around a text: its beginning-of-sequence token or nothing.

    Some tokenizers are saved to add their end-of-sequence token, too, behind which there is no answer.
    """
    if not tokenizer.is_fast:
        return
    from tokenizers.processors import TemplateProcessing

    opening = [str(tokenizer.bos_token)] if adds_bos(tokenizer) else []
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    before = [tokenizer.bos_token_id] if opening else []
    if list(tokenizer("a").input_ids) == before + plain:
        return
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=[*opening, "$A"],
        pair=[*opening, "$A", "$B:1"],
        special_tokens=list(zip(opening, before, strict=True)),
    )


def stop_at_ends(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
    """Has a model stop at every token that may end an answer in training, and at those of its own."""
    config = model.generation_config
    if config is None:
        return
    own = config.eos_token_id
    known = [] if own is None else [int(one) for one in own] if isinstance(own, list) else [int(own)]
    ends = list(dict.fromkeys([*known, *end_tokens(tokenizer)]))
    if ends != known:
        config.eos_token_id = ends if len(ends) > 1 else ends[0]
