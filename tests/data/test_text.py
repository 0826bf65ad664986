import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moka_pl.data import DataError, TextData, readers
from moka_pl.data.encoding.windows import WindowEncoder
from moka_pl.lm.scoring import IGNORE_INDEX

TEXT = "One two.\n\nThree four five.\nSix seven eight nine ten.\n"


def ready(data, tokenizer):
    data.connect(tokenizer)
    data.setup()
    return data


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=60),
    max_length=st.integers(2, 20),
    stride=st.integers(1, 25),
    end=st.booleans(),
)
def test_every_token_is_predicted_once(shared_tokenizer, text, max_length, stride, end):
    columns = WindowEncoder(shared_tokenizer, max_length, stride, end)({"text": [text]})
    ids = shared_tokenizer(text, add_special_tokens=False).input_ids
    ids += [shared_tokenizer.eos_token_id] if end else []
    predicted = [t for labels in columns["labels"] for t in labels if t != IGNORE_INDEX]
    assert predicted == ids
    whole = [shared_tokenizer.bos_token_id, *ids]
    step = min(stride, max_length - 1)
    for number, (window, labels) in enumerate(zip(columns["input_ids"], columns["labels"], strict=True)):
        assert window == whole[number * step : number * step + max_length]
        assert labels[0] == IGNORE_INDEX  # something stands before every predicted token
        assert all(label in (IGNORE_INDEX, token) for label, token in zip(labels, window, strict=True))
    assert sum(columns["words"]) == len(text.split())
    assert sum(columns["bytes"]) == len(text.encode())


def test_a_smaller_stride_gives_more_context(shared_tokenizer):
    text = "one two three four five six seven " * 4

    def contexts(stride):
        labels = WindowEncoder(shared_tokenizer, 16, stride, False)({"text": [text]})["labels"]
        return [position for row in labels[1:] for position, label in enumerate(row) if label != IGNORE_INDEX]

    assert min(contexts(4)) == 12
    assert min(contexts(16)) == 1


def test_text_file(tiny_tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("\ufeff" + TEXT, encoding="utf-8")
    data = ready(TextData(path, path, max_length=8), tiny_tokenizer)
    assert data.stride == 4
    train, validation = data._encoded["train"].rows, data._encoded["validation"].rows
    learned = [t for labels in train["labels"] for t in labels if t != IGNORE_INDEX]
    assert tiny_tokenizer.decode(learned) == f"{TEXT}<|im_end|>"
    assert sum(validation["words"][:]) == 10
    assert len(validation) > len(train)  # they overlap by half
    batch = next(iter(data.val_dataloader()))
    assert isinstance(batch["words"], int)
    assert data.eval_sets == [("text", [])]
    assert data.prompt == "raw"


def test_long_text_files_are_cut_at_line_breaks(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD", 100)
    monkeypatch.setattr(readers, "_PART", 25)
    lines = [f"line {number} " + "x" * (number % 40) + "\n" for number in range(60)]
    path = tmp_path / "long.txt"
    monkeypatch.setattr("moka_pl.data.files.text._PIECE", 30)
    path.write_text("".join(lines))
    texts = readers.read_texts(path)
    assert "".join(texts) == "".join(lines)
    assert len(texts) > 20
    assert all(text.endswith("\n") for text in texts)
    assert all(len(text) <= 25 or text.count("\n") == 1 for text in texts)
    path.write_text("".join(lines[:3]))
    assert readers.read_texts(path) == ["".join(lines[:3])]
    path.write_text("a\n" + "x" * 200)
    with pytest.raises(DataError, match="a line has more than"):
        readers.read_texts(path)


def test_records_and_columns(tiny_tokenizer, write_jsonl):
    path = write_jsonl("t.jsonl", [{"body": f"text {n} " * 3, "n": n} for n in range(8)] + [{"body": ""}])
    data = ready(TextData(path, validation_share=0.25, column="body"), tiny_tokenizer)
    assert data.report["train"].kept + data.report["validation"].kept == 8
    assert data.report["train"].dropped + data.report["validation"].dropped == 1  # the empty one
    data = ready(TextData(path, validation_share=0, column="body"), tiny_tokenizer)
    assert data.val_dataloader() == []


def test_from_the_hub(tiny_tokenizer, monkeypatch):
    import datasets

    asked = []

    def load(name, *config, split):
        asked.append((name, *config, split))
        return datasets.Dataset.from_list([{"text": f"{split} text"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    ready(TextData("some/corpus", "some/corpus", config="raw"), tiny_tokenizer)
    assert set(asked) == {("some/corpus", "raw", "train"), ("some/corpus", "raw", "validation")}


def test_bad_input(tiny_tokenizer, tmp_path, write_jsonl):
    path = write_jsonl("t.jsonl", [{"text": "fine"}, {"text": 3}])
    with pytest.raises(DataError, match=r"t\.jsonl, line 2: field 'text' must be text, found int 3"):
        ready(TextData(path), tiny_tokenizer)
    with pytest.raises(DataError, match=r"line 1: field 'body' is missing; found: text\. Set `column`"):
        ready(TextData(path, column="body"), tiny_tokenizer)
    book = tmp_path / "book.txt"
    with pytest.raises(DataError, match=r"book\.txt does not exist"):
        ready(TextData(book), tiny_tokenizer)
    book.write_bytes(b"fine\nna\xefve\n")
    with pytest.raises(DataError, match=r"book\.txt, line 2: byte 0xef at column 3 is not UTF-8"):
        ready(TextData(book), tiny_tokenizer)
    book.write_text(" \n")
    with pytest.raises(DataError, match="has no text"):
        ready(TextData(book), tiny_tokenizer)
    with pytest.raises(DataError, match="stride must be at least 1"):
        TextData(book, stride=0)


def test_tokenizer_without_special_tokens(tiny_tokenizer, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("One two.")
    tiny_tokenizer.bos_token = None
    data = ready(TextData(path, path), tiny_tokenizer)
    assert data._encoded["validation"].rows[0]["input_ids"][0] == tiny_tokenizer.eos_token_id
    tiny_tokenizer.eos_token = None
    encoder = WindowEncoder(tiny_tokenizer, 8, 8, True)
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encoder({"text": ["a"]})


def test_a_list_of_files_of_any_kind_is_read_in_its_order(tiny_tokenizer, tmp_path):
    texts = {"a.txt": "One two.", "b.jsonl": '{"text": "Three."}\n{"text": "Four."}\n', "c.txt": "Five."}
    files = [tmp_path / name for name in texts]
    for file in files:
        file.write_text(texts[file.name])
    data = ready(TextData(files, files[:2], max_length=64), tiny_tokenizer)
    for split, expected in (("train", "Onetwo.Three.Four.Five."), ("validation", "Onetwo.Three.Four.")):
        rows = data._encoded[split].rows
        found = "".join(tiny_tokenizer.decode(row, skip_special_tokens=True) for row in rows["input_ids"])
        assert found.replace(" ", "") == expected
