"""Multiple-choice questions to tokens: a prompt, and the options that continue it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moka_pl.data.encoding.examples import EncodedRow, Row, count_features
from moka_pl.data.encoding.pieces import tokenize_pieces
from moka_pl.data.encoding.report import DROPPED, KEPT, TRUNCATED

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase


def choice_item_features() -> "Features":
    """Columns of encoded multiple-choice items.

    ``shared_tokens``: tokens of the item with its prompt once; ``left_out``: solved examples that it lost.
    """
    from datasets import Features, List, Value

    return Features(
        {
            "prompt_ids": List(Value("int32")),
            "option_ids": List(List(Value("int32"))),
            "option_chars": List(Value("int32")),
            "option_names": List(Value("string")),
            "answer": Value("int32"),
            "task": Value("int32"),
            "shared_tokens": Value("int32"),
            "left_out": Value("int32"),
            **count_features(),
        }
    )


@dataclass(frozen=True)
class ChoiceEncoder:
    """Encodes one multiple-choice row to a prompt and the continuations to be compared.

    Where prompt and option do not fit into ``max_length``, the first of the row's shorter prompts that fits
    is taken; if none does, the last one loses its beginning (the beginning-of-sequence token stays), the same
    for all options. At least one token stays before an option.

    Attributes:
        tokenizer: A fast tokenizer.
        prompt: Turns a row into the text before the options.
        options: Turns a row into the texts of the options, each as it continues the prompt.
        max_length: Most tokens of prompt and option together.
        bos: Put the beginning-of-sequence token first: ``adds_bos(tokenizer)``.
        tasks: Names of the tasks; the column ``task`` holds the index of the row's ``task`` in it.
        names: What a generated answer calls each option, for prompts that are evaluated by generating.
        shorter: Further prompts for a row, each with one more of the few-shot examples left out.
    """

    batched: ClassVar[bool] = False
    features = staticmethod(choice_item_features)

    tokenizer: "PreTrainedTokenizerBase"
    prompt: Callable[[Row], str]
    options: Callable[[Row], list[str]]
    max_length: int
    bos: bool
    tasks: tuple[str, ...]
    names: Callable[[Row], list[str]] | None = None
    shorter: Callable[[Row], Sequence[str]] | None = None

    def __call__(self, row: Row) -> EncodedRow:
        """Encodes ``row``; a row with an option that does not fit comes back with the status DROPPED."""
        options = self.options(row)
        prompt_ids, option_ids = self._split(self.prompt(row), options)
        start = [self.tokenizer.bos_token_id] if self.bos else []
        longest = max(map(len, option_ids))
        room = self.max_length - longest - len(start)
        full = len(start) + len(prompt_ids) + longest
        left_out = 0
        if len(prompt_ids) > room and self.shorter is not None:
            for shorter in self.shorter(row):
                left_out += 1
                prompt_ids, option_ids = self._split(shorter, options)
                if len(prompt_ids) <= room:
                    break
        dropped = min(map(len, option_ids)) == 0 or room < (0 if start else 1)
        cut = max(0, len(prompt_ids) - room)
        if dropped:
            # Nothing of it is used; empty lists keep the cache small.
            prompt_ids, option_ids, left_out = [], [[] for _ in option_ids], 0
        else:
            prompt_ids = start + prompt_ids[cut:]
        length = len(prompt_ids) + max(map(len, option_ids))
        scored = sum(map(len, option_ids))
        return {
            "prompt_ids": prompt_ids,
            "option_ids": option_ids,
            # A space only parts the option from the prompt.
            "option_chars": [len(option.removeprefix(" ")) for option in options],
            "option_names": [] if self.names is None else self.names(row),
            "answer": row["answer"],
            "task": self.tasks.index(row["task"]),
            "shared_tokens": len(prompt_ids) + scored - len(option_ids),
            "left_out": left_out,
            "length": length,
            "padded_tokens": length * len(option_ids),
            "full_length": full,
            "tokens": len(prompt_ids) * len(option_ids) + scored,
            "trained": scored,
            "status": DROPPED if dropped else TRUNCATED if cut else KEPT,
            "ignored": row.get("ignored", ""),
        }

    def _split(self, prompt: str, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokenises prompt and option together, as in training, and parts the tokens at the option's start.

        The prompt's tokens are the same before all options.
        """
        pairs = [tokenize_pieces(self.tokenizer, [prompt, option]) for option in options]
        return pairs[0][0], [option_ids for _, option_ids in pairs]
