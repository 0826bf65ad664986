import json

import pytest

from moka_pl.data import CommonsenseData, DataError, InstructionData, MixtureData, TextData


def rows(data, split):
    return {json.dumps({k: v for k, v in row.items() if k != "location"}) for row in data._split_rows(split)}


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["make_data", "make_commonsense"])
def test_training_validation_and_test_have_nothing_in_common(kind, own, request, corpus):
    make = request.getfixturevalue(kind)
    options = {"validation_path": make().validation_path if own else None, "separate_test": True}
    if kind == "make_commonsense" and own:
        options["validation_path"] = "sample"
    data = make(**options, validation_share=0.2)
    from moka_pl.backbone.random_weights import byte_tokenizer

    data.connect(byte_tokenizer())
    train, validation, test = (rows(data, split) for split in ("train", "validation", "test"))
    assert train
    assert validation
    assert test
    assert not train & validation
    assert not train & test
    assert not validation & test
    if own:
        assert test == rows(make(validation_path=options["validation_path"]), "test")


def test_it_needs_a_share():
    for kind in (CommonsenseData, InstructionData, TextData):
        with pytest.raises(DataError, match="validation_share"):
            kind(path="sample", separate_test=True, validation_share=0)
    with pytest.raises(DataError, match="streaming"):
        InstructionData(separate_test=True, streaming=True)


def test_a_mixture_has_a_separate_test_where_all_parts_have() -> None:
    parts = [InstructionData(path="sample", separate_test=separate) for separate in (True, True, False)]
    assert [MixtureData(parts[:2]).separate_test, MixtureData(parts[1:]).separate_test] == [True, False]


@pytest.mark.parametrize("own", [False, True])
def test_texts_have_a_separate_test_as_well(own, write_jsonl):
    path = write_jsonl("train.jsonl", [{"text": f"text {number}"} for number in range(20)])
    test = write_jsonl("test.jsonl", [{"text": f"test {number}"} for number in range(3)])
    options = {"validation_path": test, "validation_split": "train"} if own else {}
    data = TextData(path, separate_test=True, validation_share=0.2, **options)
    parts = [rows(data, split) for split in ("train", "validation", "test")]
    assert [len(part) for part in parts] == ([16, 4, 3] if own else [13, 3, 4])
    assert len(set.union(*parts)) == sum(map(len, parts))
