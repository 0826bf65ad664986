import gzip
import json

import pytest

from moka_pl.data.formats.instruction import instruction_features, parse_instruction
from moka_pl.data.readers import READERS
from moka_pl.data.reading import is_local, load_hub, read_rows
from moka_pl.data.samples import sample_path
from moka_pl.data.sources import Shard, find_shards
from moka_pl.errors import DataError

GOOD = {"instruction": "Say hello.", "input": "", "output": "Hello!"}


def read(path):
    return read_rows(Shard(path), parse_instruction, instruction_features())


def refuse(path, *parts):
    with pytest.raises(DataError) as caught:
        read(path)
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


def write(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_every_kind_of_file_gives_the_same_rows(tmp_path, write_jsonl):
    records = [GOOD, {"instruction": "Say, in two\nlines", "input": "x, y", "output": 'The "end".'}]
    paths = [write_jsonl("a.jsonl", records), write(tmp_path, "a.json", json.dumps(records))]
    import csv

    with (tmp_path / "a.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["instruction", "input", "output"])
        writer.writeheader()
        writer.writerows(records)
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    for path in [*paths, tmp_path / "a.csv", tmp_path / "a.parquet"]:
        rows = read(path)
        assert [{key: row[key] for key in GOOD} for row in rows] == records
        assert len(rows.cache_files) == 1  # on disk, not in memory


def test_positions_of_rows(tmp_path, write_jsonl):
    path = write(tmp_path, "a.jsonl", "\n" + json.dumps(GOOD) + "\n\n" + json.dumps(GOOD))
    assert read(path)["location"][:] == [f"{path}, line 2", f"{path}, line 4"]
    path = write(tmp_path, "a.csv", 'instruction,output\n"two\nlines",x\na,b\n')
    assert read(path)["location"][:] == [f"{path}, line 2", f"{path}, line 4"]


def test_unchanged_file_is_read_once(write_jsonl, monkeypatch):
    path = write_jsonl("a.jsonl", [GOOD])
    first = read(path)
    monkeypatch.setitem(READERS, ".jsonl", lambda path: pytest.fail("read again"))
    second = read(path)
    assert second._fingerprint == first._fingerprint
    assert second.cache_files == first.cache_files


def test_changed_file_is_read_again(write_jsonl):
    read(write_jsonl("a.jsonl", [GOOD]))
    assert len(read(write_jsonl("a.jsonl", [GOOD, GOOD]))) == 2


def test_byte_order_mark_is_no_content(tmp_path):
    assert len(read(write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + json.dumps(GOOD).encode()))) == 1


def test_reading_leaves_the_progress_bars_as_they_were(write_jsonl, capfd):
    import datasets

    before = datasets.are_progress_bars_disabled()
    read(write_jsonl("a.jsonl", [GOOD]))
    assert datasets.are_progress_bars_disabled() == before
    assert capfd.readouterr().err == ""


def test_missing_file(tmp_path):
    refuse(tmp_path / "no.jsonl", "no.jsonl does not exist", "Check the spelling")
    refuse("no/such/file.jsonl", "does not exist", "looked at")


def test_folder(tmp_path):
    refuse(tmp_path, "is a folder")


def test_unknown_kind(tmp_path):
    refuse(write(tmp_path, "a.txt", "x"), "'.txt'", ".jsonl")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_empty_file(tmp_path, name):
    refuse(write(tmp_path, name, ""), "is empty")


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", "\n\n"), ("a.json", "[]"), ("a.csv", "instruction,output\n")]
)
def test_no_records(tmp_path, name, text):
    refuse(write(tmp_path, name, text), "has no records")


def test_malformed_lines(tmp_path):
    refuse(write(tmp_path, "a.jsonl", json.dumps(GOOD) + "\n{oops\n"), "a.jsonl, line 2: malformed JSON")
    refuse(write(tmp_path, "b.jsonl", "[1, 2]"), "line 1: expected an object with named fields, found list")
    refuse(write(tmp_path, "c.jsonl", "[\n" + json.dumps(GOOD) + "]"), "line 1", "name it .json instead")


def test_malformed_list(tmp_path):
    refuse(
        write(tmp_path, "a.json", '[\n{"instruction": "x"},\n{"instruction" "y"}]'),
        "a.json, line 3: malformed",
    )
    refuse(write(tmp_path, "b.json", '{"a": 1}\n{"a": 2}'), "b.json, line 2", "name the file .jsonl")
    refuse(write(tmp_path, "deep.json", "[" * 100_000), "deep.json: malformed JSON (maximum recursion")
    refuse(write(tmp_path, "c.json", '{"a": 1}'), "expected a list of objects, found dict")
    refuse(
        write(tmp_path, "d.json", '[{"instruction": "a", "output": "b"}, 3]'), "item 2: expected an object"
    )


def test_malformed_csv(tmp_path):
    refuse(
        write(tmp_path, "a.csv", "instruction,output\na,b\na,b,c\n"), "a.csv, line 3: 3 cells", "2 columns"
    )
    refuse(write(tmp_path, "b.csv", "instruction,output\na\n"), "b.csv, line 2: 1 cells")
    refuse(write(tmp_path, "c.csv", 'instruction,output\na,"b\n'), "c.csv, line 2: malformed CSV")


def test_malformed_parquet(tmp_path):
    refuse(write(tmp_path, "a.parquet", "no parquet"), "a.parquet: not a readable Parquet file")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
def test_bytes_that_are_not_utf8(tmp_path, name):
    content = json.dumps(GOOD).encode() + b"\nab\xffc\n"
    refuse(write(tmp_path, "x" + name, content), f"x{name}, line 2: byte 0xff at column 3 is not UTF-8")


def test_missing_field(write_jsonl):
    path = write_jsonl("a.jsonl", [GOOD] * 6 + [{"instruction": "x", "text": "y"}])
    message = refuse(path)
    assert message.startswith(
        f"{path}, line 7: field 'output' is missing; found: instruction, text. Expected"
    )
    assert "an instruction (instruction, input, output of Alpaca" in message


@pytest.mark.parametrize(
    ("record", "part"),
    [
        ({**GOOD, "output": 3}, "field 'output' must be text, found int 3"),
        ({**GOOD, "input": ["x"]}, "field 'input' must be text, found list"),
        ({"messages": "hi"}, "field 'messages' must be a list"),
        ({"messages": []}, "field 'messages' must be a list"),
        ({"messages": ["hi"]}, "field 'messages[0]' must be an object"),
        ({"messages": [{"role": "user"}]}, "field 'messages[0].content' is missing; found: role"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "'messages[0].role' is 'bot'; known roles"),
        ({"messages": [{"role": "user", "content": "x"}]}, "no assistant message"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "'messages[0].content' must be text or a list",
        ),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "image", "text": "x"}]}]},
            "must be a part of type 'text'",
        ),
        ({"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}, "has no 'text'"),
        (
            {"messages": [{"role": "assistant", "content": "x", "loss_weight": "a"}]},
            "loss_weight' must be a number",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "loss_weight": -1}]},
            "loss_weight' must be a number",
        ),
    ],
)
def test_wrong_records(write_jsonl, record, part):
    refuse(write_jsonl("a.jsonl", [GOOD, record]), "a.jsonl, line 2", part)


def test_failing_hub_gives_one_message(monkeypatch):
    import datasets

    def fail(name, split):
        raise ConnectionError("Couldn't reach\n the hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = refuse("someone/corpus", "'someone/corpus'", "Couldn't reach the hub", "network", ".jsonl")
    assert "\n" not in message


@pytest.mark.parametrize("options", [{}, {"streaming": True}])
def test_a_hub_out_of_reach_is_told_at_once(options, no_network):
    with pytest.raises(DataError, match=r"'some/corpus' is neither .* cache .* the hub cannot be reached \("):
        load_hub("some/corpus", "train", options)


def test_offline_mode_is_told(no_network, monkeypatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    refuse("some/corpus", "'some/corpus'", "HF_HUB_OFFLINE is set", "unset it")


def test_without_the_hub_its_cache_is_used(no_network, monkeypatch):
    import datasets
    from huggingface_hub import constants

    def load(name, split):
        assert constants.is_offline_mode()
        assert datasets.config.HF_HUB_OFFLINE
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert len(load_hub("some/corpus", "train", {})) == 1
    assert not constants.is_offline_mode()
    assert not datasets.config.HF_HUB_OFFLINE


def test_hub_rows_are_checked(monkeypatch):
    import datasets

    rows = datasets.Dataset.from_list([GOOD, {**GOOD, "output": None}])
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows.select([0]))
    assert read("someone/corpus")["location"][:] == ["someone/corpus (train), row 1"]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    refuse("someone/corpus", "someone/corpus (train), row 2", "'output'")


def test_what_counts_as_local(tmp_path):
    assert is_local("x.jsonl")
    assert is_local(tmp_path)
    assert not is_local("tatsu-lab/alpaca")


def test_samples():
    assert sample_path("chat_train").is_file()
    assert sample_path("chat_train.jsonl") == sample_path("chat_train")
    with pytest.raises(DataError, match=r"no sample named 'nope'.*chat_train"):
        sample_path("nope")


def test_another_kind_of_file_needs_its_reader_only(tmp_path, monkeypatch):
    def compressed(path):
        with gzip.open(path, "rt") as file:
            yield from ((f"{path}, line {number}", json.loads(line)) for number, line in enumerate(file, 1))

    monkeypatch.setitem(READERS, ".jsonl.gz", compressed)
    (tmp_path / "corpus").mkdir()
    path = write(tmp_path / "corpus", "train.jsonl.gz", gzip.compress(json.dumps(GOOD).encode()))
    assert read(path)["location"][:] == [f"{path}, line 1"]
    assert [shard.source for shard in find_shards(tmp_path / "corpus", "train")] == [path]
    assert is_local("elsewhere.jsonl.gz")
    refuse(write(tmp_path, "a.txt", "x"), ".parquet, .jsonl.gz")
