import datetime
import decimal

import pyarrow
import pytest
from pyarrow import parquet
from shared.refused import refuse

from moka_pl.data.files import text
from moka_pl.data.files.parquet_footer import claims
from moka_pl.data.files.text import MAX_RECORD
from moka_pl.data.readers import stream


def write(tmp_path, columns, **options):
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


def references(count, text):
    """The same text ``count`` times, which a file holds once."""
    return pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * count, pyarrow.int32()), [text])


@pytest.mark.parametrize(
    "columns",
    [
        {"a": references(2_000_000, "x")},
        {"a": pyarrow.array([[1] * 2_000_000])},
        {"a": pyarrow.ListArray.from_arrays([0, 2_000_000], references(2_000_000, "x"))},
    ],
    ids=["rows", "a list", "a list of texts"],
)
def test_more_values_than_bytes(tmp_path, columns):
    refuse(write(tmp_path, columns), "values in", "decompression bomb")


@pytest.mark.parametrize(
    "columns",
    [
        {"a": references(1024, "x" * (1 << 16))},
        {"a": pyarrow.ListArray.from_arrays([0, 1024], references(1024, "x" * (1 << 16)))},
        {"a": [b"\0" * (1 << 22)]},
    ],
    ids=["rows", "a list", "one value"],
)
def test_more_text_than_bytes(tmp_path, monkeypatch, columns):
    monkeypatch.setattr(text, "FREE_EXPANSION", 1 << 20)
    refuse(write(tmp_path, columns, compression="zstd"), "expands to more than 100 times")


def test_a_row_is_bounded(tmp_path):
    refuse(write(tmp_path, {"a": ["x", "y" * (MAX_RECORD + 1)]}), "row 2", "16,777,216 characters")


def test_texts_are_the_same_by_reference(tmp_path):
    rows = [
        {"a": "x", "b": [{"role": "user", "content": "x"}, {"role": "assistant", "content": None}]},
        {"a": None, "b": []},
        {"a": "y", "b": None},
    ] * 700
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert [row for _, row in stream(path)] == rows
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, use_dictionary=False)
    assert [row for _, row in stream(path)] == rows


@pytest.mark.parametrize(
    ("column", "value"),
    [
        (pyarrow.array(["x", "y"]).dictionary_encode(), "x"),
        (pyarrow.array(["x", "y"], pyarrow.large_string()), "x"),
        (pyarrow.array([["x"], []], pyarrow.large_list(pyarrow.string())), ["x"]),
        (pyarrow.array([b"x", None]), b"x"),
        (pyarrow.array([decimal.Decimal("1.5")] * 2), decimal.Decimal("1.5")),
        (pyarrow.array([datetime.date(2020, 1, 1)] * 2), datetime.date(2020, 1, 1)),
        (pyarrow.array([[("k", "v")]] * 2, pyarrow.map_(pyarrow.string(), pyarrow.string())), [("k", "v")]),
        (pyarrow.nulls(2), None),
    ],
    ids=str,
)
def test_odd_types(tmp_path, column, value):
    assert next(stream(write(tmp_path, {"a": column})))[1] == {"a": value}


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([b"\xff", b"x"]).view(pyarrow.string()),
        pyarrow.array([2**31 - 1] * 2, pyarrow.date32()),
    ],
    ids=["text that is not UTF-8", "a date out of range"],
)
def test_values_that_cannot_be_read(tmp_path, column):
    refuse(write(tmp_path, {"a": column}), "not a readable Parquet file")


@pytest.mark.parametrize("kept", [4, 12, 100, -1])
def test_damaged_files_are_told_in_one_line(tmp_path, kept):
    path = write(tmp_path, {"a": ["x"] * 10})
    path.write_bytes(path.read_bytes()[:kept])
    refuse(path, "not a readable Parquet file")


def test_claims_are_those_of_the_footer(tmp_path):
    path = write(tmp_path, {"a": ["x"] * 10, "b": [["x", "y"]] * 10})
    facts = list(claims(path))
    assert [values for values, _ in facts] == [10, 20]
    group = parquet.read_metadata(path).row_group(0)
    assert [size for _, size in facts] == [group.column(n).total_uncompressed_size for n in range(2)]


@pytest.mark.parametrize("fill", [b"\xff", b"\x00", b"\x19", b"\x1c", b"\x1b\xff"])
def test_hostile_footers(tmp_path, fill):
    footer = fill * (100_000 // len(fill))
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + footer + len(footer).to_bytes(4, "little") + b"PAR1")
    refuse(path, "not a readable Parquet file")
