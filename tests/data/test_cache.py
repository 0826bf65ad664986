import os
import random
import resource

import pytest

from moka_pl.data import InstructionData, TextData, cache
from moka_pl.data.cache import cache_folder
from moka_pl.data.formats.instruction import instruction_features, parse_instruction
from moka_pl.data.readers import READERS
from moka_pl.data.reading import read_rows
from moka_pl.data.sources import Shard
from moka_pl.errors import DataError

RECORDS = [{"instruction": f"Say {number}.", "output": f"{number} " * 20} for number in range(40)]


def read(path):
    return read_rows(Shard(path), parse_instruction, instruction_features())


def encode(path, tokenizer):
    data = InstructionData(path, validation_share=0.0, prompt="alpaca")
    data.connect(tokenizer)
    data.setup("fit")
    return data._encoded["train"].rows.to_list()


def cache_files(kind):
    return sorted((cache_folder() / kind).rglob("*.arrow"))


DAMAGES = {
    "cut": lambda content, place: content[:place],
    "emptied": lambda content, place: b"",
    "overwritten": lambda content, place: content[:place] + b"\xff" * 8 + content[place + 8 :],
    "zeroed": lambda content, place: content[:place] + bytes(len(content) - place),
}


@pytest.mark.filterwarnings("always")
@pytest.mark.parametrize(
    ("kind", "damage"),
    [("read", "cut"), ("encoded", "emptied"), ("encoded", "overwritten"), ("read", "zeroed")],
)
def test_damaged_rows_are_built_again(write_jsonl, shared_tokenizer, kind, damage):
    path = write_jsonl("a.jsonl", RECORDS)
    whole = encode(path, shared_tokenizer)
    (file,) = cache_files(kind)
    content = file.read_bytes()
    place = random.Random(f"{kind} {damage}").randrange(len(content) - 8)
    file.unlink()  # the rows above may still look at its content
    file.write_bytes(DAMAGES[damage](content, place))
    with pytest.warns(UserWarning, match=r"the cache of .* is damaged \(.*\); it is built again") as warned:
        assert encode(path, shared_tokenizer) == whole
    assert "\n" not in str(warned[0].message)
    assert encode(path, shared_tokenizer) == whole


def test_a_run_opens_each_file_once(write_jsonl, shared_tokenizer, monkeypatch):
    import datasets

    opened = []
    generate = datasets.Dataset.from_generator
    monkeypatch.setattr(
        datasets.Dataset,
        "from_generator",
        lambda *args, **options: opened.append(1) or generate(*args, **options),
    )
    paths = [write_jsonl("a.jsonl", RECORDS), write_jsonl("b.jsonl", RECORDS[:3])]
    data = InstructionData(paths[0], paths[1], prompt="alpaca")
    data.connect(shared_tokenizer)
    data.prepare_data()
    data.setup("fit")
    assert len(opened) == len(paths)


def test_what_is_prepared_is_taken_once(write_jsonl, shared_tokenizer, monkeypatch):
    encoded = []
    encode = InstructionData.encode
    monkeypatch.setattr(
        InstructionData,
        "encode",
        lambda self, split: encoded.append((split, self.prompt)) or encode(self, split),
    )
    path = write_jsonl("a.jsonl", RECORDS)
    data = InstructionData(path, path)
    data.connect(shared_tokenizer, "alpaca")
    data.prepare_data()
    data.setup("fit")
    assert encoded == [("train", "alpaca"), ("validation", "alpaca"), ("test", "alpaca")]
    data.setup("test")
    assert encoded[3:] == [("test", "alpaca")]
    data.prepare_data()
    data.connect(shared_tokenizer, "chat")  # another adapter, with which nothing is prepared
    data.setup("fit")
    assert encoded[7:] == [("train", "chat"), ("validation", "chat")]


def test_rows_stay_open_while_their_files_stay_as_they_are(write_jsonl, monkeypatch):
    monkeypatch.setattr(cache, "_MOST_OPEN", 2)
    paths = [write_jsonl(f"{name}.jsonl", RECORDS) for name in "abc"]
    first, second, third = map(read, paths)
    assert read(paths[1]) is second
    assert read(paths[2]) is third
    assert read(paths[0]) is not first  # the oldest of three
    assert len(cache._open) == 2
    for file in cache_files("read"):
        os.utime(file, (1, 1))
    assert read(paths[2]) is not third
    assert read(paths[2]).to_list() == third.to_list()


@pytest.mark.parametrize("content", [b"", b"{", b"[]"])
def test_damaged_notes_of_datasets_are_built_again(write_jsonl, content):
    path = write_jsonl("a.jsonl", RECORDS)
    rows = read(path).to_list()
    (info,) = cache_folder().rglob("dataset_info.json")
    info.write_bytes(content)
    with pytest.warns(UserWarning, match="is built again"):
        assert read(path).to_list() == rows


@pytest.mark.filterwarnings("error")
def test_what_only_looks_changed_is_kept(write_jsonl, monkeypatch):
    path = write_jsonl("a.jsonl", RECORDS)
    rows = read(path)
    monkeypatch.setitem(READERS, ".jsonl", lambda path: pytest.fail("read again"))
    (file,) = cache_files("read")
    os.utime(file, (1, 1))
    assert read(path).to_list() == rows.to_list()
    file.with_name(f"{file.name}.seal").unlink()  # as if the process had been killed before it was written
    assert read(path).to_list() == rows.to_list()


def test_a_damaged_seal_is_no_proof(write_jsonl):
    path = write_jsonl("a.jsonl", RECORDS)
    rows = read(path).to_list()
    (file,) = cache_files("read")
    file.with_name(f"{file.name}.seal").write_bytes(b"\0")
    with pytest.warns(UserWarning, match="is built again"):
        assert read(path).to_list() == rows


def test_files_that_look_unchanged_are_read_again(write_jsonl):
    path = write_jsonl("a.jsonl", RECORDS)
    times = path.stat()
    read(path)
    path.write_text(path.read_text().replace("Say", "Sing"[:3]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert read(path)[0]["instruction"] == "Sin 0."


def refused(path, tokenizer, *parts):
    with pytest.raises(DataError) as caught:
        encode(path, tokenizer)
    message = str(caught.value)
    assert "\n" not in message
    for part in ("a.jsonl", "cannot be written to the cache", "HF_DATASETS_CACHE", *parts):
        assert part in message


def test_a_cache_that_cannot_be_written(write_jsonl, shared_tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nope")
    refused(write_jsonl("a.jsonl", RECORDS), shared_tokenizer, "/proc/nope")


@pytest.mark.parametrize("room", [200, 3000])
def test_a_full_disk(write_jsonl, shared_tokenizer, room):
    path = write_jsonl("a.jsonl", RECORDS)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        refused(path, shared_tokenizer, "File too large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert len(encode(path, shared_tokenizer)) == len(RECORDS)


def test_a_killed_process_of_tokenisation(write_jsonl, shared_tokenizer, monkeypatch):
    import datasets

    def die(*args, **options):
        raise RuntimeError(
            "One of the subprocesses has abruptly died during map operation.\nTo debug the error,"
        )

    monkeypatch.setattr(datasets.Dataset, "map", die)
    with pytest.raises(DataError, match=r"abruptly died .* probably because memory ran out: lower num_proc"):
        encode(write_jsonl("a.jsonl", RECORDS), shared_tokenizer)


def test_texts_of_a_text_file_are_cached_too(tmp_path, shared_tokenizer):
    path = tmp_path / "a.txt"
    path.write_text("One two three. " * 50)
    for _ in range(2):
        data = TextData(path, validation_path=path, max_length=32)
        data.connect(shared_tokenizer)
        data.setup("fit")
    assert len(cache_files("encoded")) == 2
