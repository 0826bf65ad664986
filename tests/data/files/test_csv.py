import csv

import pytest
from shared.refused import refuse

from moka_pl.data.files.text import MAX_RECORD
from moka_pl.data.readers import stream
from moka_pl.errors import DataError

ROWS = [{"instruction": "hello", "output": "hi, there"}, {"instruction": "bye", "output": "a;b|c\td"}]


def write(tmp_path, content, name="a.csv"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(separator=",", end="\r\n", encoding="utf-8", before="", columns=("instruction", "output")):
    def cell(text):
        return f'"{text}"' if any(mark in text for mark in (separator, '"', "\n", "\r")) else text

    lines = [separator.join(columns), *(separator.join(map(cell, row.values())) for row in ROWS)]
    return (before + "".join(f"{line}{end}" for line in lines)).encode(encoding)


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_what_spreadsheets_write(tmp_path, separator, end, encoding):
    path = write(tmp_path, as_csv(separator, end, encoding))
    assert list(stream(path)) == [(f"{path}, line {line}", row) for line, row in enumerate(ROWS, start=2)]


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_both_orders_of_utf_16(tmp_path, order):
    path = write(tmp_path, as_csv("\t", encoding=order, before="\ufeff"))
    assert [row for _, row in stream(path)] == ROWS


@pytest.mark.parametrize("line", ["sep=;\r\n", '"sep=;"\r\n', "SEP=;\n"])
def test_the_line_that_names_the_separator(tmp_path, line):
    path = write(tmp_path, as_csv(";", before=line))
    assert next(stream(path)) == (f"{path}, line 3", ROWS[0])


def test_large_cells_are_read_and_the_limit_of_others_is_left_alone(tmp_path):
    before = csv.field_size_limit()
    path = write(tmp_path, f"instruction,output\na,{'x' * 1_000_000}\nb,c\n")
    rows = stream(path)
    assert len(next(rows)[1]["output"]) == 1_000_000
    assert csv.field_size_limit() == before
    assert next(rows)[1] == {"instruction": "b", "output": "c"}


def test_a_record_is_bounded(tmp_path):
    refuse(write(tmp_path, f"a,b\n1,{'x' * MAX_RECORD}\n"), "line 2", "16,777,216 characters")
    many = 'a,b\n1,"' + ("x" * 999 + "\n") * (MAX_RECORD // 1000 + 1)
    refuse(write(tmp_path, many), "line 2", "quote is not closed")


def test_empty_columns_are_left_out(tmp_path):
    path = write(tmp_path, "a,b,,\r\n1,2,,\r\n3,4\r\n5,6,,,,\r\n")
    with pytest.raises(DataError, match="line 3: 2 cells"):
        list(stream(path))
    path = write(tmp_path, "a,b,,\r\n1,2,,\r\n5,6,,,,\r\n")
    assert [row for _, row in stream(path)] == [{"a": "1", "b": "2"}, {"a": "5", "b": "6"}]
    path = write(tmp_path, ",a\n0,x\n1,y\n")  # the index of pandas
    assert [row for _, row in stream(path)] == [{"a": "x"}, {"a": "y"}]
    refuse(write(tmp_path, "a,,b\n1,2,3\n"), "line 2: cell 2 is not empty", "no name")


def test_rows_before_the_header_and_rows_of_nothing(tmp_path):
    path = write(tmp_path, ",,\r\n\r\na,b,\r\n1,2,\r\n\r\n,,\r\n;\r\n")
    with pytest.raises(DataError, match="line 7: 1 cells"):
        list(stream(path))
    path = write(tmp_path, ",,\r\n\r\na,b,\r\n1,2,\r\n\r\n,,\r\n , \r\n")
    assert list(stream(path)) == [
        (f"{path}, line 4", {"a": "1", "b": "2"}),
        (f"{path}, line 6", {"a": "", "b": ""}),
        (f"{path}, line 7", {"a": "", "b": ""}),
    ]


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"a,b\ncaf\xe9,x\n", ("line 2", "0xe9", "column 4", "encoding", "cp1252", "iconv")),
        ("a,b\n1,2,3\n", ("line 2: 3 cells", "2 columns", "separator is ','")),
        ("a;b\n1;2;3\n", ("line 2: 3 cells", "separator is ';'")),
        ("a,b\n1;2\n", ("line 2: 1 cells", "separator is ','")),
        ('a,b\n1,"2\n3,4\n', ("line 2: malformed CSV",)),
        ('a,b\n1,"2"x\n', ("line 2: malformed CSV",)),
        ("a,b,a\n1,2,3\n", ("line 1", "names 'a' 2 times")),
        ("a,b\n1,\0\n", ("line 2", "byte 0x00", "encoding", "UTF-16")),
        ("a,b\n1,2\n".encode("utf-16-le"), ("line 1", "byte 0x00", "UTF-16")),
        ("\ufeffa,b\n1,2\n".encode("utf-16-le")[:-1], ("UnicodeDecodeError",)),
        ("a,b", ("no records",)),
        ("\n\n,,\n", ("no records",)),
        (b"PK\x03\x04\x14\0", ("a zip or an Excel file", "export the sheet as CSV")),
        (b"\xd0\xcf\x11\xe0\xa1", ("an old Excel file", "as CSV")),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, content, parts):
    refuse(write(tmp_path, content), *parts)


def test_an_excel_file_is_told_how_to_be_exported(tmp_path):
    refuse(write(tmp_path, b"PK\x03\x04", "a.xlsx"), "'.xlsx'", "export the sheet as CSV")
