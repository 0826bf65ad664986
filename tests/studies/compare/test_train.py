import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import IA3Config, LoraConfig
from torch import nn

from moka_pl.adapters import MokaConfig, inject_adapter, read_adapter
from moka_pl.backbone import BackboneConfig
from moka_pl.studies.compare.build import check_suite
from moka_pl.studies.compare.runs import Store, frozen_run, run_of
from moka_pl.studies.compare.shared_base import SharedBase
from moka_pl.studies.compare.suite import Method, read_suite
from moka_pl.studies.compare.train import ADAPTER, Executor, _lora_rank

TINY = Path(__file__).parents[3] / "scripts" / "suites" / "tiny.yaml"

ANSWERED = """
backbone: {name: tiny, weights: random, quantization: none}
data:
  class_path: moka_pl.data.MixtureData
  init_args:
    batch_size: 8
    parts:
      - class_path: moka_pl.data.InstructionData
        init_args: {path: $DATA/sums, prompt: alpaca, separate_test: true, validation_share: 0.1}
      - class_path: moka_pl.data.InstructionData
        init_args: {path: $DATA/words, prompt: alpaca, separate_test: true, validation_share: 0.1}
generate: {max_new_tokens: 6, tasks: [sums, words]}
forgetting:
  class_path: moka_pl.data.TextData
  init_args: {path: $DATA/text.txt, validation_path: $DATA/text.txt, max_length: 32, stride: 32}
training: {trainer: {max_steps: 60, max_epochs: 100, accelerator: cpu}}
learning_rates: [3.0e-2]
methods: [{name: a, adapter: {components: 4, target_modules: all-linear}}]
"""


@pytest.fixture
def suite(one_thread, dataset_cache, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    changes = ["training.trainer.max_steps=2", "training.trainer.log_every_n_steps=1"]
    changes += ["training.trainer.accelerator=cpu", "data.init_args.batch_size=4"]
    return read_suite(TINY, [*changes, "data.init_args.tasks=[boolean, physical]"])


@pytest.mark.slow
def test_runs_share_base_and_batches_and_can_be_tested_later(suite, tmp_path):
    store = Store(tmp_path)
    execute = Executor(store)
    moka, _, krona = suite.methods
    runs = [run_of(suite, method, 0.01, 0) for method in (moka, krona)]
    whole = [execute(run, True) for run in runs]
    assert [outcome.get("error") for outcome in whole] == [None, None]
    assert execute.base.loads == 1
    trained = [outcome["trained"] for outcome in whole]
    assert trained[0]["batches"] == trained[1]["batches"]
    assert trained[0]["parameters"] > trained[1]["parameters"] > 0
    assert [step for step, _ in trained[0]["losses"]] == [1, 2]
    gates, spectra = trained[0]["gates"], trained[0]["spectra"]
    assert gates["steps"] == [0, 1, 2]
    assert gates["entropy"][0] == 1 > gates["entropy"][-1]
    assert [round(values[0], 4) for values in gates["shapes"].values()] == [1] * len(gates["shapes"])
    assert trained[1]["gates"] is None  # not gated
    assert len(spectra["layers"]) == len(spectra["stable_rank"]) == 4
    pairs = zip(spectra["stable_rank"], spectra["entropy_rank"], strict=True)
    assert all(1 <= stable <= entropy for stable, entropy in pairs)
    assert spectra["kinds"].keys() == {"q_proj", "v_proj"}
    assert all(kind["size"][0] == 1 and kind["index"][0] == 1 for kind in spectra["kinds"].values())
    other = execute(run_of(suite, moka, 0.01, 1), False)
    assert other["trained"]["batches"] != trained[0]["batches"]
    # Every item is there, and they add up to the scores.
    tested = whole[0]["tested"]
    items = store.read_items(runs[0])
    assert len(items["task"]) == 20
    for task, scores in tested["tasks"].items():
        own = [i for i, name in enumerate(items["task"]) if name == task]
        assert sum(items["correct_norm"][i] for i in own) / len(own) == pytest.approx(scores["acc_norm"])
        nll = sum(items["nll"][i] for i in own) / sum(items["tokens"][i] for i in own)
        assert nll == pytest.approx(scores["nll"], rel=1e-4)
    # Alone, in another process's place, the run gives the same; tested from its file, too.
    apart = Store(tmp_path / "apart")
    alone = Executor(apart)
    assert "tested" not in alone(runs[1], False)
    again = Executor(apart)(runs[1], True)
    assert again["trained"]["losses"] == store.read(runs[1])["trained"]["losses"]
    assert apart.read_items(runs[1]) == store.read_items(runs[1])
    assert (apart.path(runs[1]) / ADAPTER).is_dir()
    # The base without training scores otherwise.
    frozen = frozen_run(suite)
    assert execute(frozen, True)["trained"]["parameters"] == 0
    assert store.read_items(frozen)["nll"] != items["nll"]


@pytest.mark.slow
def test_a_run_whose_adapter_is_gone_is_trained_again_for_its_test(suite, tmp_path):
    store = Store(tmp_path)
    run = run_of(suite, suite.methods[0], 0.01, 0)
    first = Executor(store)(run, False)
    shutil.rmtree(store.path(run) / ADAPTER)
    second = Executor(store)(run, True)
    assert second["trained"]["losses"] == first["trained"]["losses"]
    assert second["tested"]["key"] == run.test_key


@pytest.mark.slow
def test_runs_choose_their_filters_and_are_tested_with_them_later(suite, tmp_path):
    execute = Executor(Store(tmp_path))
    moka = suite.methods[0]
    adapter = {"components": 2, "filters": "auto", "start": "gradient"}
    runs = [
        run_of(suite, Method("auto", adapter, moka.learning_rates), 0.01, 0),
        run_of(suite, moka, 0.01, 0),
    ]
    whole, usual = (execute(run, True) for run in runs)
    assert whole.get("error") is None
    assert execute.base.loads == 1
    assert whole["trained"]["batches"] == usual["trained"]["batches"]
    filters = read_adapter(execute.store.path(runs[0]) / ADAPTER).config.filters
    assert len(filters) == 4
    apart = Store(tmp_path / "apart")
    assert "tested" not in Executor(apart)(runs[0], False)
    again = Executor(apart)(runs[0], True)
    assert again["trained"]["losses"] == execute.store.read(runs[0])["trained"]["losses"]
    assert apart.read_items(runs[0]) == execute.store.read_items(runs[0])


def test_a_run_that_fails_leaves_a_clean_base(suite, tmp_path):
    execute = Executor(Store(tmp_path))
    broken = run_of(suite, suite.methods[0], 0.01, 0)
    broken.settings["adapter"] = {"target_modules": ["nowhere"]}
    outcome = execute(broken, True)
    assert "nowhere" in outcome["error"]
    assert "nowhere" in execute.store.read(broken)["error"]
    outcome = execute(run_of(replace(suite, spectra=False), suite.methods[0], 0.01, 0), False)
    assert outcome.get("error") is None
    assert outcome["trained"]["spectra"] is None
    assert outcome["trained"]["lora_rank"] == 64  # of full rank
    assert outcome["trained"]["step_ms"] > 0
    assert execute.base.loads == 1


@pytest.fixture
def base():
    return SharedBase(), BackboneConfig("tiny", weights="random", quantization="none")


@pytest.mark.parametrize("adapter", [MokaConfig(components=2), LoraConfig(target_modules=["q_proj"])])
def test_adapters_are_taken_out_again(base, adapter):
    shared, config = base
    model = shared.get(config, "cpu").model
    before, attributes = dict(model.named_modules()), set(vars(model))
    inject_adapter(model, adapter)
    assert dict(model.named_modules()) != before
    model.train()
    assert shared.restore()
    assert dict(model.named_modules()) == before
    assert set(vars(model)) == attributes
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    assert shared.get(config, "cpu").model is model


@pytest.mark.parametrize("spoil", ["weights", "hook"])
def test_a_spoilt_base_is_loaded_again(base, spoil):
    shared, config = base
    model = shared.get(config, "cpu").model
    if spoil == "weights":
        with torch.no_grad():
            next(model.parameters())[0, 0] += 0.1
    else:
        next(m for m in model.modules() if isinstance(m, nn.Linear)).register_forward_hook(lambda *a: None)
    assert not shared.restore()
    assert shared.get(config, "cpu").model is not model
    assert shared.loads == 2


@pytest.mark.slow
def test_answers_are_generated_and_plain_text_is_scored_before_and_after(one_thread, tmp_path):
    for task, asked in (("sums", "7"), ("words", "8")):
        (tmp_path / task).mkdir()
        for split, count, answer in (("train", 12, "7"), ("test", 3, asked)):
            rows = [{"instruction": f"{task} {split} {i}", "output": answer} for i in range(count)]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (tmp_path / task / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "text.txt").write_text("Some plain text that nobody trains on. " * 9, encoding="utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text(ANSWERED, encoding="utf-8")
    suite = read_suite(file, (), str(tmp_path))
    check_suite(suite)
    store = Store(tmp_path / "out")
    execute = Executor(store)
    runs = [frozen_run(suite), run_of(suite, suite.methods[0], 0.05, 0)]
    outcomes = [execute(run, True) for run in runs]
    assert [outcome.get("error") for outcome in outcomes] == [None, None]
    frozen, trained = (store.read_items(run) for run in runs)
    assert frozen["task"] == trained["task"] == ["sums"] * 3 + ["words"] * 3
    assert frozen["correct_norm"] == [0] * 6
    assert trained["correct_norm"] == [1] * 3 + [0] * 3  # the one answer that was trained
    assert outcomes[1]["tested"]["tasks"]["sums"]["acc_norm"] == 1
    assert trained["text_before"] == frozen["text_before"] == frozen["text_after"] == trained["text_before"]
    assert len(trained["text_after"]) == len(trained["text_tokens"]) > 1
    assert trained["text_after"] != trained["text_before"]
    # Alone, and tested later, the run gives the same.
    apart = Store(tmp_path / "apart")
    Executor(apart)(runs[1], False)
    Executor(apart)(runs[1], True)
    assert apart.read_items(runs[1]) == trained


def test_the_rank_of_a_lora_is_its_own_and_of_other_peft_methods_unknown():
    told = [
        _lora_rank(SimpleNamespace(adapter=adapter, causal_lm=nn.Linear(2, 2)))
        for adapter in (LoraConfig(r=5), LoraConfig(r=5, use_dora=True), IA3Config())
    ]
    assert told == [5, None, None]
