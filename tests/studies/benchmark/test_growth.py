from moka_pl.studies.benchmark.bench import OFFLOADED
from moka_pl.studies.benchmark.growth import grow_components, grow_sizes, grow_tokens, growth_rows


def test_over_components(bench, preset) -> None:
    records = list(grow_components(bench, preset, []))
    found = [(r.row, r.setting["components"]) for r in records]
    adapted = ["MoKA", "MoKA structured", "MoKA dense"]
    assert found == [("frozen base", 0), *((name, r) for name in adapted for r in (1, 3))]
    assert all(r.error is None and r.values["step_ms"] > 0 for r in records)
    one, three = (r.values["trainable"] for r in records[1:3])
    assert three == 3 * one


def test_over_tokens_some_rows_only(bench, preset) -> None:
    records = list(grow_tokens(bench, preset, ["frozen base", "MoKA r10"]))
    found = [(r.row, r.setting["tokens"]) for r in records]
    assert found == [(name, tokens) for tokens in (1, 16) for name in ("frozen base", "MoKA r10")]
    assert all(r.error is None and r.values["peak_gib"] > 0 for r in records)


def test_over_shapes(preset) -> None:
    records = list(grow_sizes(preset, True, []))
    assert [r.row for r in records] == ["frozen base", "MoKA r10", "LoRA r64 q,v"]
    assert all(r.error is None and r.checkpointing and r.setting == {"shape": "tiny"} for r in records)
    assert list(grow_sizes(preset, False, ["MoKA dense"])) == []
    *records, note = grow_sizes(preset, True, ["frozen base"], offload=True)
    assert [r.row for r in records] == ["frozen base"]
    assert note == OFFLOADED


def test_a_gpu_has_one_backend_more() -> None:
    assert set(growth_rows("cuda")) - set(growth_rows("cpu")) == {"MoKA fused", "MoKA r10 fused"}
