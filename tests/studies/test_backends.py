"""Backends trained side by side."""

import json

import pytest
import torch

from moka_pl.adapters import MokaConfig, inject_adapter, moka_layers
from moka_pl.studies.backends import distance, finished_runs, main, rounding

TINY = ["--model", "tiny", "--random", "--device", "cpu", "--dtype", "float32"]
TINY += ["--steps", "2", "--batch-size", "1", "--max-length", "320"]


@pytest.mark.slow
def test_rounding_shows_in_a_training(tmp_path, one_thread, dataset_cache, monkeypatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    file = tmp_path / "agreement.json"
    main([*TINY, "--backends", "dense", "rounded", "--seeds", "0", "--json", str(file)])
    exact, rounded = json.loads(file.read_text())["runs"]
    assert len(exact["losses"]) == len(rounded["losses"]) == 2
    assert exact["losses"] != rounded["losses"]
    assert exact["losses"] == pytest.approx(rounded["losses"], rel=0.05)


def test_runs_are_printed_kept_and_not_repeated(tmp_path, monkeypatch, capsys) -> None:
    file = tmp_path / "agreement.json"
    trained = []

    def train(args, backend, seed):
        trained.append((backend, seed))
        loss = 1 + seed / 100 + (backend == "rounded") / 1000
        return {"backend": backend, "seed": seed, "losses": [loss] * args.steps, "held_out": 2 * loss}

    monkeypatch.setattr("moka_pl.studies.backends.train", train)
    for _ in range(2):
        main([*TINY, "--backends", "dense", "rounded", "--json", str(file)])
    assert trained == [(backend, seed) for backend in ("dense", "rounded") for seed in (0, 1)]
    assert len(json.loads(file.read_text())["runs"]) == 4
    assert capsys.readouterr().out.splitlines()[-3:] == [
        "noise, dense, seed 0 against 1: curve 0.0100, held out 0.0200",
        "rounded against dense, seed 0: curve 0.0010, held out 0.0020",
        "rounded against dense, seed 1: curve 0.0010, held out 0.0020",
    ]


def test_runs_of_other_options_do_not_count(tmp_path) -> None:
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"device": "cpu", "runs": [{"seed": 0}]}))
    assert finished_runs(file, {"device": "cpu"}) == [{"seed": 0}]
    assert finished_runs(file, {"device": "gpu"}) == finished_runs(None, {}) == []
    assert finished_runs(tmp_path / "none", {}) == []


def test_curves_are_compared_after_averaging() -> None:
    one = [1.0] * 20 + [2.0] * 20
    assert distance(one, one) == 0
    assert distance(one, [0.5, 1.5] * 10 + [2.5] * 20) == pytest.approx(0.25)


def test_rounded_weights_are_of_bfloat16(make_llama, token_ids, randomize) -> None:
    model = make_llama()
    inject_adapter(model, MokaConfig(components=2, backend="dense"))
    randomize(model)
    layer = next(iter(moka_layers(model).values()))
    x = torch.eye(layer.in_features)
    exact = layer(x)
    with rounding():
        rounded = layer(x)
    assert torch.equal(rounded, rounded.bfloat16().float())
    assert not torch.equal(exact, rounded)
    torch.testing.assert_close(exact, rounded, rtol=1e-2, atol=1e-3)
    assert torch.equal(layer(x), exact)
