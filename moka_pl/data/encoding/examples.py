"""Text to tokens: ``input_ids`` and ``labels``, with every cut and every lost example counted."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from moka_pl._compat import rows_fingerprint
from moka_pl.data.cache import cached
from moka_pl.data.encoding.digest import rows_digest
from moka_pl.data.encoding.pieces import tokenize_pieces
from moka_pl.data.encoding.report import (
    COUNTED,
    DROPPED,
    KEPT,
    PLACES,
    TRUNCATED,
    EncodingReport,
    count_rows,
    merged,
    placed,
)
from moka_pl.data.reading import progress_bars
from moka_pl.errors import DataError
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.prompts.chats import EMPTY
from moka_pl.prompts.segments import Segment

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from transformers import PreTrainedTokenizerBase

ENCODING_VERSION = 5
"""Raise it when the same text gives other columns: caches of older versions are then left alone."""

WHOLE_CHARACTERS = 1 << 20
"""Examples of up to so many characters are tokenised whole."""

MOST_CHARACTERS = 1000
"""Of longer ones, so many characters for each token of ``max_length``; all behind them would be cut off."""

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

    @cached_property
    def digest(self) -> str:
        """A hash of the content of the rows."""
        return rows_digest(self.rows)


class Encoder(Protocol):
    """Turns checked rows into columns of tokens."""

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

    def features(self) -> "Features":
        """Columns of the encoded rows, all but ``ignored``."""

    def __call__(self, row: Any, /) -> EncodedRow:
        """Encodes a row, or rows; ``ignored`` is the JSON of the fields that are not used, or empty."""


def token_features() -> "Features":
    """Columns of encoded plain rows."""
    from datasets import Features, List, Value

    ids = List(Value("int32"))
    return Features({"input_ids": ids, "labels": ids, **count_features()})


def count_features() -> dict[str, Any]:
    """Columns that plain rows and multiple-choice items share.

    ``length``: tokens of the (longest) row; ``padded_tokens``: tokens the example takes in a batch, its rows
    padded to the longest; ``full_length``: ``length`` before any cut; ``tokens``, ``trained``: real tokens
    and trained ones; ``status``: KEPT, TRUNCATED or DROPPED.
    """
    from datasets import Value

    return {name: Value("int32") for name in ("length", "padded_tokens", *COUNTED)}


@dataclass(frozen=True)
class SegmentEncoder:
    """Encodes one row to ``input_ids`` and ``labels``.

    The text is tokenised as a whole, so that its tokens are those the model meets at inference, where a
    prompt ends before the model goes on (see ``tokenize_pieces``). A token is trained when it belongs to a
    trained segment, white space included; ``labels`` are aligned with ``input_ids`` (the loss shifts them).
    What is longer than ``max_length`` is cut on the right.

    Attributes:
        tokenizer: A fast tokenizer.
        segments: Turns a row into segments.
        max_length: Most tokens of an example, special tokens included.
        bos: Put the beginning-of-sequence token first: ``adds_bos(tokenizer)`` for plain prompts, False for
            chat templates, which write it themselves.
        left_out: Counts the fields of a row that its segments do not hold.
    """

    batched: ClassVar[bool] = False
    features = staticmethod(token_features)

    tokenizer: "PreTrainedTokenizerBase"
    segments: Callable[[Row], list[Segment]]
    max_length: int
    bos: bool
    left_out: Callable[[Row], Mapping[str, int]] | None = None

    def __call__(self, row: Row) -> EncodedRow:
        """Encodes ``row``; a row without a trained token comes back with the status DROPPED."""
        # First: where the template leaves something out, the spans of answers may not be found either.
        ignored = merged(row.get("ignored", ""), {} if self.left_out is None else self.left_out(row))
        ids: list[int] = []
        labels: list[int] = []
        whole = _stretches(self.segments(row))
        stretches = _beginning(whole, max(WHOLE_CHARACTERS, MOST_CHARACTERS * self.max_length))
        pieces = tokenize_pieces(self.tokenizer, [stretch.text for stretch in stretches])
        for stretch, piece in zip(stretches, pieces, strict=True):
            if stretch.end:
                # The id rather than its text: ``pad == eos`` or an odd tokenizer cannot lose it.
                piece = [*piece, eos_id(self.tokenizer)]
            ids += piece
            labels += piece if stretch.trained else [IGNORE_INDEX] * len(piece)
        if self.bos:
            ids.insert(0, self.tokenizer.bos_token_id)
            labels.insert(0, IGNORE_INDEX)
        encoded = token_row(ids[: self.max_length], labels[: self.max_length], full_length=len(ids))
        if stretches != whole:
            encoded["status"] = DROPPED if encoded["status"] == DROPPED else TRUNCATED
        return encoded | {"ignored": ignored}


def token_row(ids: list[int], labels: list[int], full_length: int) -> EncodedRow:
    """The columns of a plain row.

    Args:
        ids: Its tokens.
        labels: As many labels.
        full_length: Its tokens before any cut.
    """
    # The first token has nothing before it that could predict it.
    trained = sum(label != IGNORE_INDEX for label in labels[1:])
    return {
        "input_ids": ids,
        "labels": labels,
        "length": len(ids),
        "padded_tokens": len(ids),
        "full_length": full_length,
        "tokens": len(ids),
        "trained": trained,
        "status": DROPPED if trained == 0 else TRUNCATED if full_length > len(ids) else KEPT,
    }


def encode_rows(
    rows: "Dataset",
    encoder: Encoder,
    *,
    key: str,
    label: str,
    num_proc: int | None = None,
    digest: str | None = None,
) -> Encoded:
    """Encodes all rows, or takes them from the cache of an earlier call.

    The cache is keyed on the rows, the tokenizer's content, ``key``, ``max_length`` and ``ENCODING_VERSION``.

    Args:
        rows: Checked rows.
        encoder: What encodes a row, or several rows at once to any number of rows.
        key: Names everything else that the result depends on (the prompt, the tasks).
        label: What the rows are called in messages, for example ``"commonsense train"``.
        num_proc: Number of processes; None encodes in this one.
        digest: ``tokenizer_digest(encoder.tokenizer)`` where the caller has it already.

    Raises:
        DataError: No row was kept, a row cannot be rendered, or the tokenizer is not a fast one.
    """
    from datasets import Features, Value

    tokenizer = encoder.tokenizer
    if not tokenizer.is_fast:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} gives no character offsets, which are needed to "
            "locate the answer's tokens. Load its fast variant (`use_fast=True`)"
        )
    fingerprint = _fingerprint(rows, encoder, key, digest)
    columns = Features({**encoder.features(), "ignored": Value("large_string")})

    def build(base: Path, fresh: bool) -> "Dataset":
        return rows.map(
            encoder,
            batched=encoder.batched,
            remove_columns=rows.column_names,
            features=columns,
            num_proc=num_proc,
            cache_file_name=f"{base}.arrow",
            load_from_cache_file=False if fresh else None,
            new_fingerprint=fingerprint,
            desc=f"Encoding {label}",
        )

    with progress_bars(len(rows) >= QUIET_ROWS):
        encoded = cached(build, "encoded", fingerprint, label)
    ignored = encoded["ignored"][:]
    empty = [index for index, text in enumerate(ignored) if EMPTY in text]
    places = [] if encoder.batched else [str(rows[index]["location"]) for index in empty[: PLACES + 1]]
    return _without_dropped(encoded, encoder.max_length, label, places)


def _fingerprint(rows: "Dataset", encoder: Encoder, key: str, digest: str | None) -> str:
    """Returns a hash of all that encoded rows depend on.

    Tokenizers change their state when used, so the one that ``datasets`` would take is not stable.
    """
    parts = [
        rows_fingerprint(rows),
        digest or tokenizer_digest(encoder.tokenizer),
        type(encoder).__name__,
        key,
        f"{encoder.max_length} {encoder.bos}",
        str(ENCODING_VERSION),
    ]
    return sha256("\n".join(parts).encode()).hexdigest()[:32]


def _without_dropped(encoded: "Dataset", max_length: int, label: str, empty: Sequence[str]) -> Encoded:
    """Returns the rows that are kept.

    Args:
        encoded: All rows.
        max_length: Most tokens of one.
        label: What messages call them.
        empty: Where the first ones with empty answers stand.
    """
    import numpy

    counted = [name for name in (*COUNTED, "left_out") if name in encoded.column_names]
    columns = encoded.with_format("numpy", columns=counted)[:]
    report = count_rows(columns, encoded["ignored"][:])
    counts = dict(report.ignored)
    if empty and (number := counts.pop(EMPTY, 0)):
        report = replace(report, ignored={**counts, placed(EMPTY, empty): number})
    encoded = encoded.remove_columns("ignored")
    if report.kept == 0:
        raise DataError(
            f"all {report.read} examples of {label} were dropped: {nothing_trained(report, max_length)}"
        )
    if report.dropped:
        encoded = encoded.select(numpy.flatnonzero(columns["status"] != DROPPED))
    return Encoded(encoded, report)


def nothing_trained(report: EncodingReport, max_length: int) -> str:
    """Returns why no example of a report has a trained token, for a message."""
    if report.longest <= max_length:
        return (
            "none has an answer to train on. Every answer is empty, or has the weight 0 (`train: false`), or "
            "stands before the first question"
        )
    return (
        f"none has a trained or scored token within max_length={max_length} (the longest example has "
        f"{report.longest} tokens). Raise max_length"
    )


def eos_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Returns the id of the tokenizer's end-of-sequence token.

    Raises:
        DataError: The tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"the tokenizer {type(tokenizer).__name__} has no end-of-sequence token to mark the end of an "
            "answer. Set `tokenizer.eos_token`"
        )
    return int(tokenizer.eos_token_id)


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase") -> str:
    """A hash of everything in the tokenizer that decides which tokens a text gets."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    # These two hold what the latest call asked for.
    state.pop("truncation", None)
    state.pop("padding", None)
    content = [state, tokenizer.chat_template, tokenizer.bos_token_id, tokenizer.eos_token_id]
    return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _beginning(stretches: list[Segment], characters: int) -> list[Segment]:
    """Returns the first characters of stretches: tokenising a text of megabytes takes gigabytes."""
    kept: list[Segment] = []
    for stretch in stretches:
        if len(stretch.text) > characters:
            return [*kept, replace(stretch, text=stretch.text[:characters], end=False)]
        kept.append(stretch)
        characters -= len(stretch.text)
    return kept


def _stretches(segments: Sequence[Segment]) -> list[Segment]:
    """Joins neighbouring segments that are trained or not alike, unless an end token parts them."""
    stretches: list[Segment] = []
    for segment in segments:
        if stretches and stretches[-1].trained == segment.trained and not stretches[-1].end:
            stretches[-1] = replace(segment, text=stretches[-1].text + segment.text)
        else:
            stretches.append(segment)
    return stretches
