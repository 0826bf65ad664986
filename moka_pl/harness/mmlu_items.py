"""Our own scores of MMLU's questions, five worked examples before each."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from moka_pl.data.choice_rows import choice_features
from moka_pl.data.encode import ChoiceEncoder, adds_bos, encode_rows
from moka_pl.data.errors import DataError
from moka_pl.data.reading import read_rows
from moka_pl.harness.agreement import Item
from moka_pl.harness.rows import check_mmlu
from moka_pl.harness.sides import score_rows
from moka_pl.module import MokaModule

_LETTERS = "ABCD"


def own_mmlu_items(
    module: MokaModule, folder: Path, subject: str, max_length: int, batch_size: int
) -> list[Item]:
    """Our scores of a subject's test questions.

    Args:
        module: A module whose model is built.
        folder: With dev/ and test/, each with a CSV file for the subject.
        subject: The subject.
        max_length: Most tokens of a question with its examples.
        batch_size: Questions computed at once.

    Raises:
        DataError: If a file cannot be used, or a question does not fit into ``max_length``.
    """
    features = choice_features()
    shots, questions = (
        read_rows(folder / part / f"{subject}_{part}.csv", check_mmlu, features, context=subject)
        for part in ("dev", "test")
    )
    head = (
        f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    )
    head += "".join(f"{_asked(shot)} {_LETTERS[shot['answer']]}\n\n" for shot in shots)
    encoder = ChoiceEncoder(
        module.tokenizer,
        lambda row: head + _asked(row),
        lambda row: [f" {letter}" for letter in _LETTERS],
        max_length,
        adds_bos(module.tokenizer),
        (subject,),
    )
    encoded = encode_rows(questions, encoder, key=head, label=f"mmlu {subject}")
    if encoded.report.dropped or encoded.report.truncated:
        raise DataError(
            f"the comparison needs every question whole, but some of {subject} are longer than max_length "
            f"({max_length} tokens; the longest has {encoded.report.longest}). Raise max_length."
        )
    items = score_rows(module, encoded.rows, 0, batch_size)
    # What is scored is a letter, whatever stands beside it in the question.
    return [replace(item, chars=[1] * len(item.chars)) for item in items]


def _asked(row: Mapping[str, Any]) -> str:
    options = "".join(
        f"{letter}. {choice}\n" for letter, choice in zip(_LETTERS, row["choices"], strict=True)
    )
    return f"{row['question'].strip()}\n{options}Answer:"
