"""Filters chosen before a run."""

import json
import sys

import pytest

from moka_pl.studies.filters import main

CONFIG = """
model:
  backbone: {name: tiny, weights: random}
  adapter: {components: 2}
data:
  class_path: moka_pl.data.InstructionData
  init_args: {path: sample, prompt: alpaca, batch_size: 1, max_length: 320}
trainer: {accelerator: cpu, logger: false}
"""


def test_every_layer_gets_its_shapes(tmp_path, monkeypatch, one_thread, dataset_cache, capsys) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["choose_filters.py"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    for name in ("TOKENIZERS_PARALLELISM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # a run sets them; they shall not outlive the test
    config, out = tmp_path / "run.yaml", tmp_path / "filters.json"
    config.write_text(CONFIG)
    main(["--config", str(config), "--out", str(out), "--batches", "1"])
    filters = json.loads(out.read_text())
    assert {name.rpartition(".")[2] for name in filters} == {"q_proj", "v_proj"}
    assert all(len(shapes) == 2 for shapes in filters.values())
    printed = capsys.readouterr().out
    assert "of the gradient's energy" in printed
    assert f"{out}: {len(filters)} layers; most used:" in printed


def test_a_config_is_needed(capsys) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "choose_filters: error: the following arguments are required: --config" in capsys.readouterr().err
