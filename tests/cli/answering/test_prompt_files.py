"""Files of prompts."""

import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from moka_pl.cli.answering.prompt_files import read_prompts
from moka_pl.errors import MokaError

RECORDS = [{"prompt": "Hi"}, {"prompt": "Who are you?\nSay it."}]


def asked(file):
    return [row["instruction"] for row in read_prompts(file)]


def test_a_text_file_has_a_prompt_on_each_line(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("Hi\n\n  Who?\n", encoding="utf-8")
    assert asked(file) == ["Hi", "  Who?"]
    assert [row["location"] for row in read_prompts(file)] == [f"{file}, line 1", f"{file}, line 3"]
    packed = tmp_path / "prompts.TXT.gz"
    packed.write_bytes(gzip.compress(file.read_bytes()))
    assert asked(packed) == ["Hi", "  Who?"]


def test_the_other_kinds_have_records(tmp_path):
    lines, whole, table = (tmp_path / name for name in ("a.jsonl", "a.json", "a.parquet"))
    lines.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    whole.write_text(json.dumps(RECORDS))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), table)
    sheet = tmp_path / "a.csv"
    sheet.write_text('prompt\nHi\n"Who are you?\nSay it."\n')
    for file in (lines, whole, table, sheet):
        assert asked(file) == [record["prompt"] for record in RECORDS]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("a.txt", b"", "is empty .0 bytes.. Give a file with at least one prompt"),
        ("a.txt", b" \n\n", "has no prompts; write one on each line"),
        ("a.txt", b"\xff\x00\x01", "line 1: byte 0x"),
        ("a.txt.gz", gzip.compress(bytes(2**28)), "expands to more than 100 times its size"),
        ("a.jsonl", b"", "is empty"),
        ("a.jsonl", b'{"prompt": "Hi"}\n{"question": "Hi"}\n', "line 2: nothing is asked in these fields"),
        ("a.jsonl", b'{"prompt": "Hi"}\n{', "line 2: malformed JSON"),
        ("a.docx", b"PK\x03\x04", "unknown file type '.docx'. Name it by one of .txt, .json, .jsonl"),
        ("prompts", b"Hi", "unknown file type ''"),
    ],
)
def test_files_that_cannot_be_used(name, content, message, tmp_path):
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(MokaError, match=message) as caught:
        read_prompts(file)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(MokaError, match="is a folder"):
        read_prompts(tmp_path)
