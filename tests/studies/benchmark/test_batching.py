import pytest

from moka_pl.adapters import MokaConfig, inject_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.studies.benchmark.batching import (
    KINDS,
    data_of_kind,
    limit_examples,
    measure_epoch,
    summed,
    table,
)


@pytest.fixture
def tiny(one_thread):
    loaded = load_backbone(BackboneConfig("tiny", weights="random"))
    inject_adapter(loaded.model, MokaConfig(components=2))
    return loaded


def test_every_kind_computes_the_same_examples(tiny, corpus, dataset_cache, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    results = {}
    for kind in KINDS:
        data = data_of_kind(kind, tiny.tokenizer, corpus / "train.jsonl", 4, 320)
        limit_examples(data, 9)
        results[kind] = measure_epoch(tiny.model, data)
    assert {found.report.examples for found in results.values()} == {9}
    assert len({found.report.tokens for found in results.values()}) == 1
    assert all(found.seconds > 0 and found.tokens_per_second > 0 for found in results.values())
    assert results["packed"].report.rows < results["random"].report.rows == 9
    assert not any(p.grad is not None for p in tiny.model.parameters())
    first, last = results["random"], results["packed"]
    both = summed([first, first._replace(seconds=3 * first.seconds)])
    assert both.seconds == pytest.approx(2 * first.seconds)
    lines = list(table(results))
    assert len(lines) == 1 + len(KINDS)
    assert lines[1].split()[-2:] == ["1.00", "1.00"]
    assert f"{first.seconds / last.seconds:.2f}" in lines[-1]
