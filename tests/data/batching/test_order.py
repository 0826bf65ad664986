"""Loaders refuse the state of other batches, by the name of what differs."""

import pytest
from datasets import Dataset

from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.data.batching.order import change_of, check_order, differences
from moka_pl.data.encoding.digest import rows_digest, sources_digest
from moka_pl.data.sources import Shard
from moka_pl.errors import DataError


def loader(data):
    data.connect(byte_tokenizer())
    data.setup("fit")
    return data.train_dataloader()


def appended(corpus, tmp_path):
    path = tmp_path / "more.jsonl"
    path.write_text((corpus / "train.jsonl").read_text() + '{"instruction": "new", "output": "no"}\n')
    return path


def edited(corpus, tmp_path):
    path = tmp_path / "edited.jsonl"
    text = (corpus / "train.jsonl").read_text()
    first = text.split('"output": "', 1)[1][0]
    other = "a" if first != "a" else "b"
    path.write_text(text.replace(f'"output": "{first}', f'"output": "{other}', 1))  # as many tokens as before
    return path


@pytest.mark.parametrize(
    ("options", "named", "allowed"),
    [
        ({"path": appended}, "rows 13, now 14", "data"),
        ({"path": edited}, r"saved with other batches: data \w+, now", "data"),
        ({"batch_size": 1}, "batch_size 2, now 1", "batch_size"),
        ({"max_tokens": 400}, "batch_size 2, now None, max_tokens None, now 400", "batch_size"),
        ({"seed": 5}, "seed 0, now 5", "seed"),
        ({"bucket": False}, "bucket True, now False", "data"),
        ({"packing": True}, "packing False, now True", "data"),
        ({"max_length": 200}, "max_length 320, now 200", "data"),
        ({"prompt": "chat"}, "prompt alpaca, now chat", "data"),
    ],
)
def test_a_state_of_other_batches_is_refused(make_data, corpus, tmp_path, options, named, allowed):
    if callable(options.get("path")):
        options = {"path": options["path"](corpus, tmp_path)}
    batches = iter(first := loader(make_data()))
    next(batches)
    second = loader(make_data(**options))
    with pytest.raises(DataError, match=rf"{named}.*allow_changes '\[[a-z_, ]*{allowed}"):
        second.load_state_dict(first.state_dict())


def test_a_file_elsewhere_and_other_workers_are_the_same_batches(make_data, corpus, tmp_path):
    (tmp_path / "moved.jsonl").write_bytes((corpus / "train.jsonl").read_bytes())
    first = loader(make_data())
    served = [batch["input_ids"].tolist() for batch in first]
    state = first.state_dict() | {"served": 3}
    second = loader(make_data(path=tmp_path / "moved.jsonl", eval_batch_size=1, validation_share=0.5))
    second.load_state_dict(state)
    assert [batch["input_ids"].tolist() for batch in second] == served[3:]


def test_a_stream_of_other_files_is_refused(make_data, corpus, tmp_path):
    options = {"streaming": True, "stream_buffer": 4}
    state = loader(make_data(**options)).state_dict()
    loader(make_data(**options)).load_state_dict(state)
    for change, named in (
        ({"path": appended(corpus, tmp_path)}, "source"),
        ({"stream_buffer": 6}, "stream_buffer 4, now 6"),
        ({"seed": 1}, "seed 0, now 1"),
    ):
        with pytest.raises(DataError, match=named):
            loader(make_data(**(options | change))).load_state_dict(state)


def test_a_stream_and_a_file_do_not_go_on_from_each_other(make_data):
    """Of older states, which do not tell, only the keys do."""
    loaders = loader(make_data()), loader(make_data(streaming=True, stream_buffer=4))
    for saved, resumed in (loaders, loaders[::-1]):
        state = saved.state_dict()
        was = state["order"].pop("streaming")
        with pytest.raises(DataError, match="saved by another kind of loader"):
            resumed.load_state_dict(state)
        state["order"]["streaming"] = was
        with pytest.raises(DataError, match=rf"streaming {was}, now {not was}.*allow_changes '\[data\]'"):
            resumed.load_state_dict(state)


def test_what_an_older_state_lacks_is_not_compared():
    check_order(None, {"seed": 1})
    check_order({"seed": 1}, {"seed": 1, "new": 2})
    assert differences({"betas": (0.9, 0.99)}, {"betas": [0.9, 0.99]}) == {}
    assert change_of("anything") == "data"


def test_digests_are_of_the_content(tmp_path):
    columns = {"input_ids": [[1, 2], [3]], "length": [2, 1], "names": [["a"], ["b", "c"]]}
    rows = Dataset.from_dict(columns)
    again = Dataset.from_dict({name: [values[1], values[0]] for name, values in columns.items()})
    assert rows_digest(rows) == rows_digest(again.select([1, 0]))
    assert rows_digest(rows) != rows_digest(again)
    moved = Dataset.from_dict(columns | {"input_ids": [[1], [2, 3]]})  # the same tokens, cut elsewhere
    assert rows_digest(rows) != rows_digest(moved)
    for name, text in (("a.txt", "one"), ("b.txt", "one"), ("c.txt", "two")):
        (tmp_path / name).write_text(text)
    a, b, c, hub = (
        sources_digest([Shard(s)]) for s in (*(tmp_path / f"{n}.txt" for n in "abc"), "some/data")
    )
    assert a == b
    assert len({a, c, hub}) == 3
