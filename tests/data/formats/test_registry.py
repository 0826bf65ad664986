import pytest

from moka_pl.data import DataError
from moka_pl.data.formats import choice, instruction
from moka_pl.data.formats.base import Format, require_text
from moka_pl.data.formats.common import Item
from moka_pl.data.formats.registry import CHOICE_FORMATS, INSTRUCTION_FORMATS
from moka_pl.data.reading import read_rows
from moka_pl.data.sources import Shard

QUIZ = Format(
    "a quiz card (front, back)",
    ("front", "back"),
    lambda record: "front" in record,
    lambda record: {"instruction": require_text(record, "front"), "output": require_text(record, "back")},
)
YES_NO = Format(
    "a claim (claim, true)",
    ("claim", "true"),
    lambda record: "claim" in record,
    lambda record: Item(require_text(record, "claim"), ["true", "false"], 0 if record["true"] else 1),
)


def test_a_new_format_is_told_read_and_named_in_messages(write_jsonl, monkeypatch):
    monkeypatch.setattr(instruction, "INSTRUCTION_FORMATS", (*INSTRUCTION_FORMATS, QUIZ))
    records = [{"instruction": "a", "output": "b"}, {"front": "Capital of France?", "back": "Paris"}]
    path = write_jsonl("cards.jsonl", records)
    rows = read_rows(Shard(path), instruction.parse_instruction, instruction.instruction_features())
    assert rows["output"][:] == ["b", "Paris"]
    with pytest.raises(DataError, match=r"'back' is missing; found: front\. Expected .*a quiz card \(front"):
        instruction.parse_instruction({"front": "x"})


def test_a_new_format_of_questions(monkeypatch):
    monkeypatch.setattr(choice, "CHOICE_FORMATS", (YES_NO, *CHOICE_FORMATS))
    row = choice.parse_choice({"claim": "Ice is hot.", "true": False}, "facts")
    assert row == {"task": "facts", "question": "Ice is hot.", "choices": ["true", "false"], "answer": 1}


@pytest.mark.parametrize("formats", [INSTRUCTION_FORMATS, CHOICE_FORMATS])
def test_no_format_takes_what_is_in_none(formats):
    assert not any(format.fits({"something": "else"}) for format in formats)
    assert len({format.description for format in formats}) == len(formats)
