"""Text to tokens: `input_ids` and `labels`, with every cut and every lost example counted."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from moka_pl._compat import rows_fingerprint
from moka_pl.data.encoding.report import EncodingReport
from moka_pl.data.reading import progress_bars
from moka_pl.errors import DataError
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.prompts.segments import Segment

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

ENCODING_VERSION = 2
"""Raise it when the same text gives other columns: caches of older versions are then left alone."""

KEPT, TRUNCATED, DROPPED = 0, 1, 2
"""Values of the column `status`."""

QUIET_ROWS = 20_000
"""Fewer rows than this are encoded without a progress bar."""

Row = Mapping[str, Any]
EncodedRow = dict[str, Any]


@dataclass(frozen=True)
class Encoded:
    """Encoded rows of one split and what happened on the way.

    Attributes:
        rows: The rows that were kept.
        report: Counts over all rows, the lost ones included.
    """

    rows: "Dataset"
    report: EncodingReport


@dataclass(frozen=True)
class SegmentEncoder:
    """Encodes one row to `input_ids` and `labels`.

    The text is tokenised as a whole, so that its tokens are those the model meets at inference. A token is
    trained when all of its characters lie in trained segments; `labels` are aligned with `input_ids` (the
    loss shifts them). What is longer than `max_length` is cut on the right.

    Attributes:
        tokenizer: A fast tokenizer (character offsets are needed).
        segments: Turns a row into segments.
        max_length: Most tokens of an example, special tokens included.
        bos: Put the beginning-of-sequence token first: `adds_bos(tokenizer)` for plain prompts, False for
            chat templates, which write it themselves.
    """

    batched: ClassVar[bool] = False

    tokenizer: "PreTrainedTokenizerBase"
    segments: Callable[[Row], list[Segment]]
    max_length: int
    bos: bool

    @property
    def features(self) -> "Features":
        """Columns of the encoded rows."""
        return token_features()

    def __call__(self, row: Row) -> EncodedRow:
        """Encode `row`; a row without a trained token comes back with the status DROPPED."""
        segments = self.segments(row)
        text = "".join(segment.text for segment in segments)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids: list[int] = list(encoding["input_ids"])
        spans = _trained_spans(segments)
        labels = [
            token if _inside(start, end, spans) else IGNORE_INDEX
            for token, (start, end) in zip(ids, encoding["offset_mapping"], strict=True)
        ]
        if segments and segments[-1].end:
            # The id rather than its text: `pad == eos` or an odd tokenizer cannot lose it.
            eos = _eos(self.tokenizer)
            ids.append(eos)
            labels.append(eos if segments[-1].trained else IGNORE_INDEX)
        if self.bos:
            ids.insert(0, self.tokenizer.bos_token_id)
            labels.insert(0, IGNORE_INDEX)
        full = len(ids)
        ids, labels = ids[: self.max_length], labels[: self.max_length]
        # The first token has nothing before it that could predict it.
        trained = sum(label != IGNORE_INDEX for label in labels[1:])
        status = DROPPED if trained == 0 else TRUNCATED if full > len(ids) else KEPT
        return {
            "input_ids": ids,
            "labels": labels,
            "length": len(ids),
            "slots": len(ids),
            "full_length": full,
            "tokens": len(ids),
            "trained": trained,
            "status": status,
        }


@dataclass(frozen=True)
class ChoiceEncoder:
    """Encodes one multiple-choice row to a prompt and the continuations to be compared.

    Where prompt and option do not fit into `max_length`, the first of the row's shorter prompts that fits is
    taken; if none does, the last one loses its beginning (the beginning-of-sequence token stays), the same
    for all options. At least one token stays before an option.

    Attributes:
        tokenizer: A fast tokenizer (character offsets are needed).
        prompt: Turns a row into the text before the options.
        options: Turns a row into the texts of the options, each as it continues the prompt.
        max_length: Most tokens of prompt and option together.
        bos: Put the beginning-of-sequence token first: `adds_bos(tokenizer)`.
        tasks: Names of the tasks; the column `task` holds the index of the row's `task` in it.
        names: What a generated answer calls each option, for prompts that are evaluated by generating.
        shorter: Further prompts for a row, each shorter than the one before it: one with one more example of
            few left out.
    """

    batched: ClassVar[bool] = False

    tokenizer: "PreTrainedTokenizerBase"
    prompt: Callable[[Row], str]
    options: Callable[[Row], list[str]]
    max_length: int
    bos: bool
    tasks: tuple[str, ...]
    names: Callable[[Row], list[str]] | None = None
    shorter: Callable[[Row], Sequence[str]] | None = None

    @property
    def features(self) -> "Features":
        """Columns of the encoded rows."""
        return choice_item_features()

    def __call__(self, row: Row) -> EncodedRow:
        """Encode `row`; a row with an option that does not fit comes back with the status DROPPED."""
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
            "shared": len(prompt_ids) + scored - len(option_ids),
            "left_out": left_out,
            "length": length,
            "slots": length * len(option_ids),
            "full_length": full,
            "tokens": len(prompt_ids) * len(option_ids) + scored,
            "trained": scored,
            "status": DROPPED if dropped else TRUNCATED if cut else KEPT,
        }

    def _split(self, prompt: str, options: Sequence[str]) -> tuple[list[int], list[list[int]]]:
        """Tokenise prompt and option together, as in training, and part the tokens at the option's start.

        Options start with a space, where tokenizers split, so the prompt's tokens are the same before all.
        """
        prompt_ids: list[int] = []
        option_ids: list[list[int]] = []
        for option in options:
            encoding = self.tokenizer(
                prompt + option, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids = list(encoding["input_ids"])
            offsets = encoding["offset_mapping"]
            border = next(
                (i for i, (start, end) in enumerate(offsets) if end > start >= len(prompt)), len(ids)
            )
            prompt_ids = ids[:border]
            option_ids.append(ids[border:])
        return prompt_ids, option_ids


class Encoder(Protocol):
    """What turns checked rows into columns of tokens."""

    @property
    def batched(self) -> bool:
        """Whether it takes many rows at once, as columns."""

    @property
    def tokenizer(self) -> "PreTrainedTokenizerBase":
        """A fast tokenizer."""

    @property
    def max_length(self) -> int:
        """Most tokens of a row."""

    @property
    def bos(self) -> bool:
        """Whether a beginning-of-sequence token is put before a row."""

    @property
    def features(self) -> "Features":
        """Columns of the encoded rows."""

    def __call__(self, row: Any, /) -> EncodedRow:
        """Encode a row, or rows."""


def encode_rows(
    rows: "Dataset",
    encoder: Encoder,
    *,
    key: str,
    label: str,
    num_proc: int | None = None,
    digest: str | None = None,
) -> Encoded:
    """Encode all rows, or take them from the cache of an earlier call.

    The cache is keyed on the rows, the tokenizer's content, `key`, `max_length` and `ENCODING_VERSION`.

    Args:
        rows: Checked rows.
        encoder: What encodes a row, or several rows at once to any number of rows.
        key: Names everything else that the result depends on (the prompt, the tasks).
        label: What the rows are called in messages, for example `"commonsense train"`.
        num_proc: Number of processes; None encodes in this one.
        digest: `tokenizer_digest(encoder.tokenizer)` where the caller has it already.

    Returns:
        The rows that were kept, and the counts.

    Raises:
        DataError: No row was kept, a row cannot be rendered, or the tokenizer is not a fast one.
    """
    tokenizer = encoder.tokenizer
    if not tokenizer.is_fast:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} gives no character offsets, so it cannot be told "
            "which tokens are the answer. Load its fast variant (`use_fast=True`)."
        )
    parts = [
        rows_fingerprint(rows),
        digest or tokenizer_digest(tokenizer),
        type(encoder).__name__,
        key,
        f"{encoder.max_length} {encoder.bos}",
        str(ENCODING_VERSION),
    ]
    # Tokenizers change their state when used, so the hash `datasets` would take of the function is not
    # stable.
    fingerprint = sha256("\n".join(parts).encode()).hexdigest()[:32]
    with progress_bars(len(rows) >= QUIET_ROWS):
        encoded = rows.map(
            encoder,
            batched=encoder.batched,
            remove_columns=rows.column_names,
            features=encoder.features,
            num_proc=num_proc,
            new_fingerprint=fingerprint,
            desc=f"Encoding {label}",
        )
    return _count(encoded, encoder.max_length, label)


def _count(encoded: "Dataset", max_length: int, label: str) -> Encoded:
    import numpy

    columns = encoded.with_format("numpy", columns=["status", "tokens", "trained", "full_length"])[:]
    kept = columns["status"] != DROPPED
    report = EncodingReport(
        read=len(kept),
        kept=int(kept.sum()),
        truncated=int((columns["status"] == TRUNCATED).sum()),
        dropped=int((~kept).sum()),
        tokens=int(columns["tokens"][kept].sum()),
        trained=int(columns["trained"][kept].sum()),
        longest=int(columns["full_length"].max(initial=0)),
    )
    if "left_out" in encoded.column_names:
        left_out = numpy.asarray(encoded["left_out"][:], dtype=numpy.int64)
        report = replace(report, shortened=int((left_out > 0).sum()), left_out=int(left_out.sum()))
    if report.kept == 0:
        raise DataError(
            f"All {report.read} examples of {label} were dropped: within max_length={max_length} tokens none "
            f"has a token to learn or to score (the longest has {report.longest} tokens). Raise max_length."
        )
    if report.dropped:
        encoded = encoded.select(numpy.flatnonzero(kept))
    return Encoded(encoded, report)


def adds_bos(tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Whether the tokenizer by itself puts its beginning-of-sequence token before a text."""
    if tokenizer.bos_token_id is None:
        return False
    special = (
        tokenizer.build_inputs_with_special_tokens([]) if not tokenizer.is_fast else tokenizer("").input_ids
    )
    return bool(special) and special[0] == tokenizer.bos_token_id


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of everything in the tokenizer that decides which tokens a text gets."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two hold what the latest call asked for.
    state.pop("truncation", None)
    state.pop("padding", None)
    content = [state, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def token_features() -> "Features":
    """Columns of encoded plain rows."""
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    return Features({"input_ids": ids, "labels": ids, **_counts()})


def choice_item_features() -> "Features":
    """Columns of encoded multiple-choice items."""
    from datasets import Features, List, Value

    return Features(
        {
            "prompt_ids": List(Value("int32")),
            "option_ids": List(List(Value("int32"))),
            "option_chars": List(Value("int32")),
            "option_names": List(Value("string")),
            "answer": Value("int32"),
            "task": Value("int32"),
            # Slots of the item where its prompt stands only once, and how many examples its prompt lost.
            "shared": Value("int32"),
            "left_out": Value("int32"),
            **_counts(),
        }
    )


def _counts() -> dict[str, Any]:
    """Columns that both kinds share.

    `length`: tokens of the (longest) row; `slots`: tokens the example takes in a batch, its rows padded to
    the longest; `full_length`: `length` before any cut; `tokens`, `trained`: real tokens and trained ones;
    `status`: KEPT, TRUNCATED or DROPPED.
    """
    from datasets import Value

    names = ("length", "slots", "full_length", "tokens", "trained", "status")
    return {name: Value("int32") for name in names}


def _trained_spans(segments: Sequence[Segment]) -> list[tuple[int, int]]:
    """Character ranges (start, end) of the trained segments; neighbours are joined."""
    spans: list[tuple[int, int]] = []
    position = 0
    for segment in segments:
        end = position + len(segment.text)
        if segment.trained and segment.text:
            if spans and spans[-1][1] == position:
                spans[-1] = (spans[-1][0], end)
            else:
                spans.append((position, end))
        position = end
    return spans


def _inside(start: int, end: int, spans: Sequence[tuple[int, int]]) -> bool:
    return end > start and any(first <= start and end <= last for first, last in spans)


def _eos(tokenizer: "PreTrainedTokenizerBase") -> int:
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"The tokenizer {type(tokenizer).__name__} has no end-of-sequence token, so a model could not "
            "learn where an answer ends. Set `tokenizer.eos_token`."
        )
    return int(tokenizer.eos_token_id)
