import bz2
import gzip
import json
import lzma
import os
from pathlib import Path

import pyarrow
import pytest

from moka_pl.data import CommonsenseData, InstructionData, MixtureData, MmluData, TextData
from moka_pl.data.batching.loader import EvalDataLoader, ResumableDataLoader
from moka_pl.data.batching.samplers import TrainSampler
from moka_pl.data.encoding.report import ignored_fields
from moka_pl.data.files import text
from moka_pl.data.readers import READERS, stream
from moka_pl.data.reading import is_local, load_hub
from moka_pl.data.sources import find_shards
from moka_pl.errors import DataError

GOOD = {"instruction": "Say hello.", "output": "Hello!"}
LINE = json.dumps(GOOD) + "\n"


def refuse(path, *parts):
    with pytest.raises(DataError) as caught:
        list(stream(path))
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def ready(data, tokenizer, *stages):
    data.connect(tokenizer)
    for stage in stages:
        data.setup(stage)
    return data


PACKED = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda data: pyarrow.compress(data, codec="zstd", asbytes=True),
}


@pytest.mark.parametrize("suffix", PACKED)
def test_compressed_files(tmp_path, suffix):
    path = tmp_path / f"train.jsonl{suffix}"
    path.write_bytes(PACKED[suffix](LINE.encode() * 3))
    assert list(stream(path)) == [(f"{path}, line {number}", GOOD) for number in (1, 2, 3)]
    assert [shard.source for shard in find_shards(tmp_path, "train")] == [path]
    path.write_bytes(path.read_bytes()[:-9])
    refuse(path, path.name, "not a readable .jsonl file")


@pytest.mark.parametrize("suffix", PACKED)
def test_bombs(tmp_path, suffix, monkeypatch):
    monkeypatch.setattr(text, "FREE_EXPANSION", 1 << 18)
    for name, content in (("a.jsonl", b"x" * (1 << 20)), ("b.csv", b"a,b\n" + b"1,2\n" * (1 << 18))):
        path = tmp_path / f"{name}{suffix}"
        path.write_bytes(PACKED[suffix](content))
        refuse(path, path.name, "decompression bomb")


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", gzip.compress(b"{}", mtime=0), ("compressed", ".jsonl.gz")),
        ("a.jsonl.gz", LINE.encode(), ("not a readable .jsonl file", "BadGzipFile")),
        ("a.json", b"PAR1", ("a Parquet file", "Name it .parquet")),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS", "git lfs pull")),
        ("a.arrow", b"ARROW1", ("'.arrow'", "an Arrow file", "Parquet")),
        ("a.parquet.gz", b"PAR1", ("unknown file type",)),
        ("a", b"x", ("unknown file type ''",)),
    ],
)
def test_files_that_are_another_kind(tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content)
    refuse(path, name, *parts)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    refuse(tmp_path / "pipe.jsonl", "pipe or a device")
    (tmp_path / "zero.jsonl").symlink_to("/dev/zero")
    refuse(tmp_path / "zero.jsonl", "pipe or a device")
    (tmp_path / "nowhere.jsonl").symlink_to("no.jsonl")
    refuse(tmp_path / "nowhere.jsonl", "a link to no.jsonl, which does not exist")
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    refuse(tmp_path / "loop.jsonl", "cannot be read (Too many levels of symbolic links)")
    refuse(tmp_path / f"{'x' * 300}.jsonl", "cannot be read (File name too long)")
    refuse(tmp_path / "*.jsonl", "does not exist", "Patterns are not expanded")
    refuse(tmp_path / "a\0b.jsonl", "does not exist")
    for address in ("https://example.org/a.jsonl", "s3://bucket/a.jsonl"):
        refuse(Path(address), "does not exist", "Addresses are not read: download the file")
    assert is_local("data/train-*")
    assert is_local("~nobody-of-this-name/x.jsonl")
    assert not is_local("x" * 5000)


def test_a_folder_with_a_link_to_nowhere_is_refused(tmp_path):
    (tmp_path / "train-0.jsonl").write_text(LINE)
    (tmp_path / "train-1.jsonl").symlink_to("gone.jsonl")
    with pytest.raises(DataError, match=r"train-1\.jsonl is a link to gone"):
        find_shards(tmp_path, "train")


@pytest.mark.parametrize("name", [b"tr\xffain.jsonl", b"tr\nain.jsonl", "trään.jsonl".encode()])
def test_odd_names_of_files(tmp_path, shared_tokenizer, name):
    path = tmp_path / os.fsdecode(name)
    path.write_text(LINE * 4)
    data = ready(InstructionData(path, validation_share=0.0, prompt="alpaca"), shared_tokenizer, "fit")
    assert data.report["train"].kept == 4
    path.write_text("{")
    refuse(path, "line 1")


@pytest.mark.parametrize(
    "error", [KeyError("x"), OSError(5, "Input/output error"), MemoryError(), RuntimeError("two\nlines")]
)
def test_whatever_a_reader_raises_is_one_line(tmp_path, monkeypatch, error):
    def fail(path):
        yield f"{path}, line 1", GOOD
        raise error

    monkeypatch.setitem(READERS, ".jsonl", fail)
    path = tmp_path / "a.jsonl"
    path.write_text(LINE)
    refuse(path, "a.jsonl", "not a readable .jsonl file after line 1", type(error).__name__)


@pytest.mark.parametrize(
    "name", ["csv", "json", "text", "parquet", "arrow", "imagefolder", "webdataset", "generator"]
)
def test_readers_of_datasets_are_no_data(name, shared_tokenizer):
    with pytest.raises(DataError, match=f"'{name}': no such file or dataset"):
        load_hub(name, "train", {})
    for data in (InstructionData(name), TextData(name), CommonsenseData(name), MmluData(name)):
        with pytest.raises(DataError, match=f"'{name}': no such file or dataset"):
            ready(data, shared_tokenizer, "validate")


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("a.csv", "instruction,output\r\na,b\r\n,\r\nc,d\r\n , \r\n", 3),
        ("a.jsonl", f'{LINE}{{"instruction": "", "output": null}}\n{LINE}{{"output": NaN}}\n', 2),
    ],
)
def test_blank_rows_are_counted_with_their_lines(tmp_path, shared_tokenizer, name, content, line):
    path = tmp_path / name
    path.write_text(content)
    for _ in range(2):  # the second time from the cache
        data = InstructionData(path, validation_share=0.0, prompt="alpaca")
        report = ready(data, shared_tokenizer, "fit").report["train"]
        assert report.read == 2
        skipped = f"skipped: 2 rows of empty cells (from {path}, line {line} on)"
        assert ignored_fields(report.ignored) == skipped


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl"])
def test_empty_answers_are_named_with_their_lines(tmp_path, shared_tokenizer, name):
    path = tmp_path / name
    empty = [(f"q{number}", "" if number % 2 else "a") for number in range(1, 16)]
    if name == "a.csv":
        path.write_text("instruction,output\n" + "".join(f"{asked},{answer}\n" for asked, answer in empty))
    else:
        path.write_text("\n" + "".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in empty))
    data = InstructionData(path, validation_share=0.0, prompt="alpaca")
    report = ready(data, shared_tokenizer, "fit").report["train"]
    assert (report.kept, report.dropped) == (7, 8)
    lines = "; ".join(f"{path}, line {line}" for line in (2, 4, 6, 8, 10))
    assert ignored_fields(report.ignored) == f"not trained: 8 empty answers ({lines}; ...)"
    kept = InstructionData(path, validation_share=0.0, prompt="alpaca", empty_answers="train")
    assert ready(kept, shared_tokenizer, "fit").report["train"].kept == 15


@pytest.mark.parametrize(("name", "content"), [("a.csv", "a,b\n,\n,\n"), ("a.json", '[{"a": ""}]')])
def test_blank_rows_alone_are_no_data(tmp_path, shared_tokenizer, name, content):
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match="only rows of empty cells"):
        ready(InstructionData(path, validation_share=0.0), shared_tokenizer, "fit")


def test_blank_rows_of_a_stream_are_counted(tmp_path, shared_tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("instruction,output\r\na,b\r\n,\r\nc,d\r\n,\r\n")
    data = InstructionData(path, streaming=True, validation_share=0.0, prompt="alpaca", batch_size=1)
    loader = ready(data, shared_tokenizer).train_dataloader()
    assert len(list(loader)) == 2


def test_a_header_with_an_unknown_separator_is_told_so(tmp_path, shared_tokenizer):
    path = tmp_path / "a.csv"
    path.write_text("instruction^output\na^b\n")
    with pytest.raises(
        DataError, match=r"fields: instruction\^output \(one field: is its separator another one"
    ):
        ready(InstructionData(path, validation_share=0.0), shared_tokenizer, "fit")


@pytest.fixture
def tests_only(tmp_path):
    for task in ("physics", "biology"):
        (tmp_path / "tasks" / task).mkdir(parents=True)
        items = [{"question": f"{n}?", "choices": ["a", "b"], "answer": 0} for n in range(3)]
        (tmp_path / "tasks" / task / "test.json").write_text(json.dumps(items))
    (tmp_path / "chats").mkdir()
    (tmp_path / "chats" / "test.jsonl").write_text(LINE)
    (tmp_path / "mmlu" / "test").mkdir(parents=True)
    question = "question,choice0,choice1,choice2,choice3,answer\nq,a,b,c,d,0\n"
    (tmp_path / "mmlu" / "test" / "anatomy_test.csv").write_text(question)
    return tmp_path


@pytest.mark.parametrize("options", [{}, {"separate_test": True}, {"validation_share": 0.0}])
def test_folders_of_tests_alone_are_evaluated(tests_only, shared_tokenizer, options):
    stages = ["test", "predict"] if options.get("separate_test") else ["validate", "test", "predict"]
    folder = tests_only / "tasks" / "physics" if options else tests_only / "tasks"
    data = ready(CommonsenseData(folder, **options), shared_tokenizer, *stages)
    assert data.report["test"].read == (3 if options else 6)
    with pytest.raises(DataError, match=r"no train\.json in|no training file"):
        data.setup("fit")


def test_all_kinds_of_tests_alone_are_evaluated(tests_only, shared_tokenizer):
    parts = [
        CommonsenseData(tests_only / "tasks"),
        InstructionData(tests_only / "chats", prompt="alpaca"),
        MmluData(tests_only / "mmlu", shots=0),
    ]
    mixture = ready(MixtureData(parts), shared_tokenizer, "test")
    assert [part.report["test"].read for part in parts] == [6, 1, 1]
    with pytest.raises(DataError, match=r"no train\.json in"):
        mixture.setup("fit")
    streamed = InstructionData(tests_only / "chats", streaming=True, prompt="alpaca")
    assert ready(streamed, shared_tokenizer, "validate").report["validation"].read == 1


def test_weights_are_those_of_the_parts_with_training_rows(tests_only, write_jsonl, shared_tokenizer):
    small, large = (
        write_jsonl(f"{n}.jsonl", [{"instruction": f"{i}", "output": "x"} for i in range(n)]) for n in (2, 6)
    )
    options = {"validation_share": 0.0, "prompt": "alpaca"}
    parts = [
        InstructionData(small, **options),
        MmluData(tests_only / "mmlu", shots=0),
        InstructionData(large, **options),
    ]
    mixture = ready(MixtureData(parts, weights=[1, 9, 1]), shared_tokenizer, "fit")
    assert len(mixture._encoded["train"].rows) == 12


class Dying:
    def __len__(self):
        return 8

    def __getitem__(self, index):
        os.kill(os.getpid(), 9)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [EvalDataLoader, ResumableDataLoader])
def test_a_killed_worker_is_one_line(kind):
    sampler = TrainSampler([1] * 8, 2) if kind is ResumableDataLoader else None
    loader = kind(Dying(), batch_size=None, sampler=sampler, num_workers=1)
    with pytest.raises(
        DataError, match=r"a worker that loads data was killed .*memory ran out\. Lower num_workers"
    ):
        list(loader)
