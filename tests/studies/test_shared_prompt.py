"""Scoring with and without shared prompts."""

import pytest

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.data import CommonsenseData
from moka_pl.studies.shared_prompt import Measured, line, measure


@pytest.fixture
def measured(one_thread, dataset_cache, monkeypatch) -> Measured:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    loaded = load_backbone(BackboneConfig("tiny", weights="random", quantization="none"))
    data = CommonsenseData("sample", tasks=["boolean"], validation_limit=5, generated_tokens=0, batch_size=3)
    data.connect(loaded.tokenizer)
    data.setup("validate")
    return measure(loaded.model, data, 2, "cpu")


def test_both_give_the_same_answers(measured) -> None:
    alone, together = measured.answers
    assert alone.keys() == together.keys()
    for key, (right, scores) in alone.items():
        assert together[key][0] == right
        assert together[key][1] == pytest.approx(scores, abs=1e-3)
    assert len(measured.whole) == len(measured.shared) == 2
    assert f"{len(alone)}/{len(alone)}" in line("boolean", measured)


def test_the_ratio_is_of_the_medians() -> None:
    answers = {"a": (True, [-1.0, -2.0]), "b": (False, [-1.0, -1.5])}
    others = {"a": (True, [-1.0, -2.0]), "b": (True, [-1.25, -1.0])}
    measured = Measured([4.0, 1.0, 9.0], [2.0, 1.0, 8.0], (answers, others))
    assert measured.ratio == 2
    assert line("x", measured).split() == ["x", "2", "0.50", "1.00", "2.00", "1/2", "5.0e-01"]
