"""A row that fails leaves no trace."""

import json
import weakref
from dataclasses import asdict

import pytest
import torch

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark import cases
from moka_pl.studies.benchmark.bench import load_results

MOKA = cases.moka("MoKA r10")


def work(model) -> dict[str, float]:
    with torch.no_grad():
        return {"sum": float(model(torch.arange(6)[None]).logits.double().sum())}


def test_rows_share_one_clean_model(bench) -> None:
    seen = []

    def remember(model) -> dict[str, float]:
        seen.append(model)
        return work(model)

    first, adapted, again = (
        bench.measure(row, remember)[0] for row in (cases.frozen(), MOKA, cases.frozen("again"))
    )
    assert first == again != adapted
    assert seen[0] is seen[1] is seen[2]


def test_what_fails_is_reported_and_its_memory_freed(bench) -> None:
    expected, _ = bench.measure(cases.frozen(), work)
    kept = []

    def fail(model) -> dict[str, float]:
        held = torch.zeros(1000)
        kept.append(weakref.ref(held))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore of it")

    values, error = bench.measure(MOKA, fail)
    assert values == {}
    assert error == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert kept[0]() is None
    assert bench.measure(cases.frozen(), work) == (expected, None)


def half_in(model):
    """Fails with one layer replaced and a hook left behind."""
    MOKA.put(model)
    model.get_input_embeddings().register_forward_hook(lambda *args: None)
    raise ValueError("half in")


def not_out(model):
    MOKA.put(model)

    def remove() -> None:
        raise ValueError("stuck")

    return remove


@pytest.mark.parametrize("put", [half_in, not_out])
def test_a_model_that_cannot_be_restored_is_built_again(put, bench, capsys) -> None:
    expected, _ = bench.measure(cases.frozen(), work)
    _, error = bench.measure(cases.Row("bad", put), work)
    assert error == ("ValueError: half in" if put is half_in else None)
    assert ("cannot remove bad: ValueError: stuck" in capsys.readouterr().err) == (put is not_out)
    assert bench.measure(cases.frozen(), work) == (expected, None)


def test_rows_in_turns_are_compared_within_a_turn(bench) -> None:
    # The machine takes twice as long in every further turn: single times say nothing, ratios do.
    order: list[str] = []
    cost = {"frozen base": 10.0, "MoKA r10": 12.0, "LoRA r8 q,v": 15.0}

    def timed(model, row) -> dict[str, float]:
        turn = order.count(row.name)
        order.append(row.name)
        return {"step_ms": cost[row.name] * 2**turn, "peak_gib": 1.0 + turn, "trainable": 3, "steps": 2}

    def fail(model):
        raise ValueError("no")

    rows = [*(cases.Row(name, lambda model: lambda: None) for name in cost), cases.Row("bad", fail)]
    *good, bad = bench.compare_in_turns("steps", rows, "step_ms", timed, 3)
    assert order == [*cost, *reversed(cost), *cost]
    assert bad.error == "ValueError: no"
    for record, name in zip(good, cost, strict=True):
        assert record.row == name
        assert record.values["step_ms"] == 2 * cost[name]
        assert record.values["steps"] == 6
        assert record.values["peak_gib"] == 3.0
        for key in ("ratio_q1", "ratio", "ratio_q3"):
            assert record.values[key] == pytest.approx(cost[name] / 10)
        assert record.values["lora_ratio"] == pytest.approx(cost[name] / 15)


def test_a_row_may_spoil_the_model(bench) -> None:
    models = []

    def remember(model) -> dict[str, float]:
        models.append(id(model))
        models.append(model)
        return {}

    bench.measure(cases.Row("spoils", lambda model: lambda: None, spoils=True), remember)
    bench.measure(cases.frozen(), remember)
    assert models[0] != models[2]


def test_a_model_that_cannot_be_built_is_a_failure_of_its_rows() -> None:
    from moka_pl.studies.benchmark.bench import Bench

    _, error = Bench("no-such", "cpu").measure(cases.frozen(), work)
    assert error is not None
    assert error.startswith("BackboneError: unknown shape 'no-such' for weights: random")


def test_round_trip(results, tmp_path) -> None:
    file = tmp_path / "results.json"
    results.save(file)
    results.save(file)
    assert load_results(file) == results
    assert asdict(load_results(file)) == asdict(results)
    assert json.loads(file.read_text())["format"] == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "has no results of format 1; write it with"),
        ('{"format": 2}', "has no results of format 1"),
        ('{"format": 1}', "is damaged: 'records'"),
        ('{"format": 1, "records": [{"row": "x"}]}', "is damaged"),
        ('{"format": 1, "records": [], "preset": {}}', "is damaged"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_results(file)
    assert str(file) in str(caught.value)


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no\.json cannot be read: No such file"):
        load_results(tmp_path / "no.json")


def test_checkpointing_may_offload() -> None:
    from moka_pl.studies.benchmark.bench import OFFLOADED, Bench
    from moka_pl.studies.benchmark.steps import time_steps

    bench = Bench("tiny", "cpu", checkpointing=True, offload=True)
    values, error = bench.measure(MOKA, lambda model: time_steps(model, 1, 4, 0, 2, 9.0))
    assert error is None
    assert values["steps"] == 2
    assert OFFLOADED in bench.notes


def test_layers_are_compiled_with_the_adapters_in_them(bench, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        "moka_pl.lm.compiled.compile_layers",
        lambda model: seen.append(any("moka_B" in name for name, _ in model.named_parameters())),
    )
    for row in (MOKA, cases.on_backbone(MOKA, compile="layers"), MOKA):
        assert bench.measure(row, lambda model: {"ok": 1.0}) == ({"ok": 1.0}, None)
    assert seen == [True]


def test_layers_that_are_offloaded_are_not_compiled() -> None:
    from moka_pl.studies.benchmark.bench import Bench

    bench = Bench("tiny", "cpu", checkpointing=True, offload=True)
    _, error = bench.measure(cases.on_backbone(MOKA, compile="layers"), work)
    assert error == "ConfigError: compile layers does not go with --offload"


def test_rows_in_8_bits_are_not_measured_in_others(bench) -> None:
    _, error = bench.measure(cases.on_backbone(MOKA, matmul="fp8"), work)
    assert error is not None
    assert error.startswith("ConfigError: backbone.matmul is fp8, which needs an NVIDIA GPU")
