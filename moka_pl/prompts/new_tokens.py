"""Tokens that are added to a tokenizer, and the pieces that they were before."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from moka_pl.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Where a tokenizer remembers the pieces.
_MARK = "_moka_new_tokens"


def add_new_tokens(tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]) -> None:
    """Adds tokens to a tokenizer, which finds them verbatim in any text, in the next free numbers.

    Those that the chat template writes are special tokens, which answers are shown without.

    Args:
        tokenizer: A tokenizer, changed in place.
        tokens: Their texts.

    Raises:
        ConfigError: If one is a token already.
    """
    from transformers import AddedToken

    pieces = [list(tokenizer(text, add_special_tokens=False).input_ids) for text in tokens]
    known = tokenizer.get_vocab()
    for text, parts in zip(tokens, pieces, strict=True):
        number = known.get(text, parts[0] if len(parts) == 1 and parts[0] != tokenizer.unk_token_id else None)
        if number is not None:
            raise ConfigError(
                f"backbone.new_tokens: {text!r} is token {number} already; leave it out, and if its row is "
                f"to be trained set --model.adapter.trainable_token_indices '[{number}]'"
            )
    template = str(tokenizer.chat_template or "")
    for text in tokens:
        special = text in template
        tokenizer.add_tokens([AddedToken(text, special=special, normalized=False)], special_tokens=special)
    numbers = tokenizer.convert_tokens_to_ids(list(tokens))
    unknown = tokenizer.unk_token_id
    kept = [[one for one in parts if one != unknown] for parts in pieces]
    setattr(tokenizer, _MARK, dict(zip(numbers, kept, strict=True)))


def new_token_pieces(tokenizer: "PreTrainedTokenizerBase") -> dict[int, list[int]]:
    """Returns the tokens that each new one, by its number, was cut into before; empty without new ones."""
    found: dict[int, list[int]] = getattr(tokenizer, _MARK, {})
    return found
