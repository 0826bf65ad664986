"""The comparison on digits: picking rates, its table, and that the page shows the stored one."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from moka_pl.adapters import FullFineTuning
from moka_pl.studies import digits
from moka_pl.studies.digits import METHODS, REFERENCE, Method, Run, mean_error, pick_rate, table

ROOT = Path(__file__).parents[2]
STORED = ROOT / "scripts/results/vision/digits.json"


@pytest.mark.parametrize(
    ("best", "picked", "edge", "tried"),
    [(3.0, 3.0, False, 3), (30.0, 27.0, False, 5), (0.1, 1 / 9, False, 6), (1e9, 9 * 3.0**4, True, 7)],
)
def test_a_rate_is_picked_that_is_no_edge(best, picked, edge, tried):
    asked = []

    def loss_at(rate):
        asked.append(rate)
        return abs(rate - best)

    rate, at_edge = pick_rate([1.0, 3.0, 9.0], loss_at)
    assert (pytest.approx(rate), at_edge, len(asked)) == (picked, edge, tried)


def test_the_table_pairs_methods_by_seed():
    def run(method, rate, seed, accuracy, loss):
        return asdict(Run(method, rate, seed, 1234, 0.0, loss, accuracy, 1.0))

    runs = [run("mine", 0.1, seed, 0.5 + 0.1 * seed, 1.0) for seed in (1, 0)]
    runs += [run("mine", 0.3, seed, 1.0, 0.0) for seed in (0, 1)]  # not picked
    runs += [run(REFERENCE, 0.2, seed, 0.4 + 0.1 * seed, 2.0 - seed) for seed in (0, 1)]
    picked = {"mine": {"rate": 0.1, "edge": True}, REFERENCE: {"rate": 0.2, "edge": False}}
    mine, reference = table({"runs": runs, "picked": picked}).splitlines()[2:]
    assert mine == "| mine | 1,234 | 0.1* | 55.0 ± 5.0 | 1.000 ± 0.000 | +10.0 ± 0.0 | -0.500 ± 0.500 |"
    assert reference == "| LoRA r4 | 1,234 | 0.2 | 45.0 ± 5.0 | 1.500 ± 0.500 |  |  |"
    assert mean_error([0.25], "+.1f") == "+0.2"


def test_methods_of_the_comparison_have_as_many_parameters_as_lora():
    found = json.loads(STORED.read_text(encoding="utf-8"))
    counts = {run["method"]: run["parameters"] for run in found["runs"]}
    assert counts.keys() == {method.name for method in METHODS}
    for name in ("MoKA, square", "MoKA, servable"):
        assert counts[name] - counts[REFERENCE] == 24 * 4  # the gates of 24 layers
    assert {run["seed"] for run in found["runs"]} == set(range(5))


def test_the_page_shows_what_is_stored():
    text = table(json.loads(STORED.read_text(encoding="utf-8")))
    assert STORED.with_suffix(".md").read_text(encoding="utf-8") == f"{text}\n"
    assert text in (ROOT / "docs/vision.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_adapts_a_base_of_its_own(monkeypatch, tmp_path, capsys, one_thread):
    method = Method("head only", lambda: FullFineTuning(target_modules=["classifier"]), (1e-2, 3e-2, 9e-2))
    monkeypatch.setattr(digits, "METHODS", [method])
    monkeypatch.setattr(digits, "pick_rate", lambda rates, loss_at: (rates[0], loss_at(rates[0]) < 0))
    file = tmp_path / "digits.json"
    monkeypatch.setattr(
        "sys.argv", ["digits.py", "--seeds", "1", "--epochs", "2", "--base-epochs", "1", "--json", str(file)]
    )
    digits.main()
    found = json.loads(file.read_text())
    (run,) = found["runs"]
    assert run["parameters"] == 5 * 64 + 5
    assert run["rate"] == 1e-2
    assert 0 < run["test_loss"] < 1.7
    assert file.with_suffix(".md").read_text() in capsys.readouterr().out
