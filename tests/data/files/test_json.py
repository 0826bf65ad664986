import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shared.refused import refuse

from moka_pl.data.files import text
from moka_pl.data.files.json import json_list, parse_json
from moka_pl.data.files.text import MAX_RECORD
from moka_pl.data.readers import stream

GOOD = '{"instruction": "a", "output": "b"}'


def refuse_content(tmp_path, name, content, *parts):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuse(path, *parts)


BAD = {
    "a lone surrogate": ('{"output": "\\ud83d"}', "half of a character"),
    "a lone surrogate in a key": ('{"\\uDC00": 1}', "half of a character"),
    "a lone surrogate further down": ('{"messages": [{"content": ["\\ud83dx"]}]}', "half of a character"),
    "the halves in the wrong order": ('{"output": "\\ude00\\ud83d"}', "half of a character"),
    "an integer of many digits": ('{"output": ' + "9" * 5000 + "}", "4300 digits"),
    "a key twice": ('{"output": "a", "output": "b"}', "'output' twice"),
    "a key twice further down": ('{"a": [{"b": 1, "b": 1}]}', "'b' twice"),
    "a zero byte": ('{"output": "a\0"}', "byte 0x00"),
    "deep lists": ("[" * 100_000, "recursion"),
    "deep objects": ('{"a":' * 100_000, "recursion"),
    "a control character": ('{"output": "\x01"}', "Invalid control character"),
    "no object": ("3", "found int"),
    "not a number": ("NaN", "found float"),
    "a bare word": ("nope", "Expecting value"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(tmp_path, name):
    content, part = BAD[name]
    refuse_content(tmp_path, "a.jsonl", f"{GOOD}\n{content}\n", "line 2", part)


@pytest.mark.parametrize("name", BAD)
def test_a_bad_item_is_named(tmp_path, name):
    content, part = BAD[name]
    refuse_content(
        tmp_path, "a.json", f"[{GOOD},\n{content}]", "item 2" if part.startswith("found") else "line 2", part
    )


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (f"[{GOOD},]", ("line 1", "Expecting value", "column 38")),
        (f"[{GOOD}", ("Expecting ',' delimiter",)),
        (f"[{GOOD}\n{GOOD}]", ("line 2", "Expecting ',' delimiter")),
        (f"[{GOOD}]\n]", ("line 2", "Extra data")),
        ('[{"a": "b', ("Unterminated string",)),
        ('[{"a": "\\ud8', ("Invalid \\uXXXX escape",)),
        ("[tru", ("Expecting value",)),
        ("  \n", ("no records",)),
        ("[ ]", ("no records",)),
        ("null", ("found NoneType",)),
    ],
)
def test_malformed_lists(tmp_path, content, parts):
    refuse_content(tmp_path, "a.json", content, *parts)


def test_pairs_of_surrogates_are_characters():
    assert parse_json('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


def test_a_record_is_bounded(tmp_path):
    long = "x" * MAX_RECORD
    refuse_content(tmp_path, "a.jsonl", f'{GOOD}\n{{"a": "{long}"}}', "line 2", "16,777,216 characters")
    refuse_content(tmp_path, "a.json", f'[{GOOD},{{"a": "{long}"}}]', "item 2", "16,777,216 characters")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_breaks(tmp_path, encoding, end):
    for name, content in (("a.jsonl", f"{GOOD}{end}{GOOD}{end}"), ("a.json", f"[{end}{GOOD},{end}{GOOD}]")):
        path = tmp_path / name
        path.write_bytes(content.encode(encoding))
        assert [row for _, row in stream(path)] == [json.loads(GOOD)] * 2


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, max_examples=15)
@given(
    records=st.lists(st.dictionaries(st.text(max_size=3), VALUES, max_size=3), max_size=4),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    piece=st.integers(1, 40),
)
def test_a_list_is_read_the_same_in_pieces(tmp_path_factory, records, indent, ascii_only, piece):
    path = tmp_path_factory.mktemp("pieces") / "a.json"
    path.write_text(json.dumps(records, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_PIECE", piece)
        assert [row for _, row in json_list(path)] == records
