import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moka_pl.data.encoding import examples
from moka_pl.data.encoding.examples import SegmentEncoder, encode_rows, tokenizer_digest
from moka_pl.data.encoding.report import DROPPED, KEPT, TRUNCATED
from moka_pl.errors import DataError
from moka_pl.lm.scoring import IGNORE_INDEX
from moka_pl.prompts.ends import adds_bos
from moka_pl.prompts.segments import Segment

SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
# Text that the byte-level tokenizer gives back as it was: no lone surrogates, no special tokens.
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=30)


def as_segments(row):
    return [Segment(row["prompt"], False), Segment(row["completion"], True, end=True)]


def pairs(*completions):
    from datasets import Dataset

    return Dataset.from_list([{"prompt": "Say hello:", "completion": text} for text in completions])


@SETTINGS
@given(prompt=TEXT, completion=TEXT, max_length=st.integers(2, 40))
def test_labels_cover_the_completion_only(shared_tokenizer, prompt, completion, max_length):
    encoder = SegmentEncoder(shared_tokenizer, as_segments, max_length, bos=False)
    # A space as border: there the tokenizer always splits.
    columns = encoder({"prompt": prompt.rstrip() + ":", "completion": " x" + completion})
    ids, labels = columns["input_ids"], columns["labels"]
    assert len(ids) == len(labels) == columns["length"] <= max_length
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(ids, labels, strict=True))
    full = SegmentEncoder(shared_tokenizer, as_segments, 10_000, bos=False)(
        {"prompt": prompt.rstrip() + ":", "completion": " x" + completion}
    )
    assert (
        shared_tokenizer.decode([t for t in full["labels"] if t != IGNORE_INDEX])
        == " x" + completion + "<|im_end|>"
    )
    masked = [t for t, label in zip(full["input_ids"], full["labels"], strict=True) if label == IGNORE_INDEX]
    assert shared_tokenizer.decode(masked) == prompt.rstrip() + ":"
    assert (ids, labels) == (full["input_ids"][:max_length], full["labels"][:max_length])
    cut = full["length"] > max_length
    lost = all(label == IGNORE_INDEX for label in labels)
    assert columns["status"] == (DROPPED if lost else TRUNCATED if cut else KEPT)
    assert columns["full_length"] == full["length"]


@SETTINGS
@given(pieces=st.lists(st.tuples(TEXT, st.booleans()), min_size=1, max_size=5))
def test_labels_stay_inside_trained_segments(shared_tokenizer, pieces):
    segments = [Segment(text, flag) for text, flag in pieces]
    columns = SegmentEncoder(shared_tokenizer, lambda row: row["segments"], 10_000, False)(
        {"segments": segments}
    )
    pairs = zip(columns["labels"], columns["input_ids"], strict=True)
    assert all(label in (IGNORE_INDEX, token) for label, token in pairs)
    learned = [token for token in columns["labels"] if token != IGNORE_INDEX]
    assert shared_tokenizer.decode(columns["input_ids"]) == "".join(text for text, _ in pieces)
    assert shared_tokenizer.decode(learned) == "".join(text for text, flag in pieces if flag)


def test_real_eos_is_trained_although_it_is_the_padding(tiny_tokenizer):
    assert tiny_tokenizer.pad_token_id == tiny_tokenizer.eos_token_id
    columns = SegmentEncoder(tiny_tokenizer, as_segments, 64, False)({"prompt": "Hi", "completion": " you"})
    assert columns["labels"][-1] == columns["input_ids"][-1] == tiny_tokenizer.eos_token_id


def test_bos_only_where_the_tokenizer_adds_one(tiny_tokenizer, bos_tokenizer):
    assert not adds_bos(tiny_tokenizer)
    assert adds_bos(bos_tokenizer)
    row = {"prompt": "Hi", "completion": " you"}
    columns = SegmentEncoder(bos_tokenizer, as_segments, 64, adds_bos(bos_tokenizer))(row)
    expected = [*bos_tokenizer("Hi you").input_ids, bos_tokenizer.eos_token_id]
    assert columns["input_ids"] == expected
    assert columns["labels"][0] == IGNORE_INDEX


def test_tokenizer_without_eos(tiny_tokenizer):
    tiny_tokenizer.eos_token = None
    with pytest.raises(DataError, match="no end-of-sequence token"):
        SegmentEncoder(tiny_tokenizer, as_segments, 64, False)({"prompt": "Hi", "completion": " you"})


def test_slow_tokenizer(tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(type(tiny_tokenizer), "is_fast", False)
    with pytest.raises(DataError, match="no character offsets"):
        encode_rows(pairs("x"), SegmentEncoder(tiny_tokenizer, as_segments, 9, False), key="k", label="l")


def test_report_counts(tiny_tokenizer):
    from datasets import Dataset

    rows = Dataset.from_list(
        [
            {"prompt": "a", "completion": " b"},
            {"prompt": "a", "completion": " b" * 40},
            {"prompt": "a " * 40, "completion": " b"},
        ]
    )
    encoder = SegmentEncoder(tiny_tokenizer, as_segments, 16, False)
    encoded = encode_rows(rows, encoder, key="k", label="l")
    first = encoder(rows[0])
    report = encoded.report
    assert (report.read, report.kept, report.truncated, report.dropped) == (3, 2, 1, 1)
    assert report.tokens == first["length"] + 16
    assert report.trained == first["trained"] + 15
    assert report.longest == max(encoder(row)["full_length"] for row in rows)
    assert len(encoded.rows) == 2
    assert "3 examples read, 2 kept (1 truncated), 1 dropped" in str(report)
    assert (report + report).read == 6


def test_all_dropped(tiny_tokenizer):
    encoder = SegmentEncoder(tiny_tokenizer, as_segments, 2, False)
    with pytest.raises(
        DataError, match=r"all 2 examples of some train were dropped: .*max_length=2.*Raise max_length"
    ):
        encode_rows(pairs(" one", " two"), encoder, key="k", label="some train")


def test_second_call_hits_the_cache(tiny_tokenizer, write_jsonl, monkeypatch):
    from datasets import Dataset

    rows = Dataset.from_json(str(write_jsonl("p.jsonl", [{"prompt": "a", "completion": " b"}])))

    def run(**changes):
        options = {"tokenizer": tiny_tokenizer, "max_length": 32, "bos": False} | changes
        key = options.pop("key", "k")
        return encode_rows(rows, SegmentEncoder(segments=as_segments, **options), key=key, label="l")

    first = run()
    tiny_tokenizer("some text", truncation=True, max_length=2, padding="max_length")  # changes its state
    with monkeypatch.context() as patch:
        patch.setattr(SegmentEncoder, "__call__", lambda self, row: pytest.fail("encoded again"))
        second = run()
    assert second.rows[:] == first.rows[:]
    assert second.report == first.report
    calls = []
    original = SegmentEncoder.__call__
    monkeypatch.setattr(SegmentEncoder, "__call__", lambda self, row: calls.append(1) or original(self, row))
    run(max_length=31)
    run(key="other")
    run(bos=True)
    tiny_tokenizer.chat_template = "another"
    run()
    monkeypatch.setattr(examples, "ENCODING_VERSION", -1)
    run()
    assert len(calls) == 5


def test_digest_follows_the_vocabulary(tiny_tokenizer):
    before = tokenizer_digest(tiny_tokenizer)
    tiny_tokenizer.add_tokens(["newword"])
    assert tokenizer_digest(tiny_tokenizer) != before


def test_only_the_beginning_of_an_endless_text_is_tokenised(shared_tokenizer, monkeypatch):
    encoder = SegmentEncoder(shared_tokenizer, as_segments, 12, bos=False)
    rows = [{"prompt": "Hi:", "completion": " one two" * 100}, {"prompt": "Hi " * 100, "completion": " one"}]
    whole = [encoder(row) for row in rows]
    monkeypatch.setattr(examples, "WHOLE_CHARACTERS", 150)
    monkeypatch.setattr(examples, "MOST_CHARACTERS", 10)
    for row, before in zip(rows, whole, strict=True):
        after = encoder(row)
        assert after["full_length"] < before["full_length"]
        assert after | {"full_length": 0} == before | {"full_length": 0}
