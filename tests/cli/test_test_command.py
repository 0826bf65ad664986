"""Evaluation as a user runs it: validate and test on an adapter, from the command line."""

import json
import sys
import warnings
from pathlib import Path

import pytest
import yaml

from moka_pl.adapters import read_adapter
from moka_pl.cli.main import main

RUN = Path("lightning_logs/moka/version_0")


@pytest.fixture
def cli(tmp_path, monkeypatch, dataset_cache, one_thread):
    """Runs a Lightning command on the tiny backbone in a folder of the test's own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", dataset_cache)
    for name in ("TOKENIZERS_PARALLELISM", "PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")  # a run sets them; they shall not outlive the test
    monkeypatch.setattr(sys, "argv", ["moka_pl"])
    monkeypatch.chdir(tmp_path)

    def run(command, data, init, *arguments):
        config = {
            "model": {"backbone": {"name": "tiny", "weights": "random"}, "adapter": {"components": 3}},
            "data": {"class_path": f"moka_pl.data.{data}", "init_args": init},
            "trainer": {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
        }
        Path("config.yaml").write_text(yaml.safe_dump(config))
        main([command, "--config", "config.yaml", *map(str, arguments)])

    return run


@pytest.fixture
def questions(question_file):
    """The file of 9 questions of two tasks."""
    return {"path": str(question_file), "validation_path": str(question_file)}


def metrics(version, command):
    return json.loads((RUN.with_name(f"version_{version}") / f"{command}.json").read_text())


def test_an_adapter_is_evaluated_in_its_own_prompt(cli, questions, capsys):
    cli("fit", "CommonsenseData", questions | {"prompt": "letters", "max_length": 256})
    adapter = RUN / "adapters/best"
    assert read_adapter(adapter).extra["prompt"] == "letters"
    options = questions | {"max_length": 256}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cli("validate", "CommonsenseData", options, "--model.adapter_path", adapter)
    assert not [w for w in seen if "was trained with `prompt" in str(w.message)]
    stored = read_adapter(adapter).extra["metrics"]
    found = metrics(1, "validate")
    assert (found["prompt"], found["adapter"]) == ("letters", str(adapter))
    assert found["sets"]["commonsense"]["loss"] == pytest.approx(stored["val/loss"], rel=1e-6)
    assert found["mean"]["accuracy"] == stored["val/accuracy"]
    capsys.readouterr()
    with pytest.warns(UserWarning, match="trained with `prompt: letters`") as seen:
        cli("test", "CommonsenseData", options | {"prompt": "cloze"}, "--model.adapter_path", adapter)
    assert len([w for w in seen if "was trained with `prompt" in str(w.message)]) == 1
    output = capsys.readouterr().out
    assert "acc_norm (%)" in output
    assert "test/accuracy" not in output  # one table, not two
    assert metrics(2, "test")["prompt"] == "cloze"


@pytest.mark.parametrize("command", ["validate", "test"])
def test_an_adapter_of_another_base_is_refused(cli, questions, capsys, command):
    cli("fit", "CommonsenseData", questions | {"max_length": 128}, "--trainer.max_steps", 1)
    capsys.readouterr()
    other = ["--model.adapter_path", RUN / "adapters/last", "--model.backbone.seed", 1]
    with pytest.raises(SystemExit) as ended:
        cli(command, "CommonsenseData", questions | {"max_length": 128}, *other)
    assert ended.value.code == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "was trained on another base model: 'tiny' with fingerprint" in message
    assert "Load the adapter's base instead" in message


def test_mmlu(cli, tmp_path, capsys):
    header = "question,choice0,choice1,choice2,choice3,answer"
    for subject, count in (("virology", 3), ("astronomy", 2), ("marketing", 2)):
        for part in ("dev", "test"):
            path = tmp_path / "mmlu" / part / f"{subject}_{part}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = [f"{subject} {part} {n}?,one,two,three,four,{n}" for n in range(count)]
            path.write_text("\n".join([header, *rows]) + "\n")
    init = {"path": str(tmp_path / "mmlu"), "shots": 2, "max_length": 400}
    cli("test", "MmluData", init)
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()]
    wanted = ["mmlu_astronomy", "mmlu_virology", "mmlu_stem, all items", "mmlu_other, all items"]
    wanted += ["mmlu_other, mean of 2 tasks", "mmlu, all items", "mmlu, mean of 3 tasks"]
    assert set(wanted) <= set(rows)
    found = metrics(0, "test")
    assert found["groups"]["mmlu"]["items"] == 7
    assert found["groups"]["mmlu"]["macro"]["accuracy"] == pytest.approx(found["mean"]["accuracy"])
    assert found["examples"][0]["left_out"] == 0
    path = tmp_path / "mmlu/test/virology_test.csv"
    path.write_text(path.read_text().replace(",two,three,four,2", ",two,,four,2"))
    with pytest.raises(SystemExit):
        cli("test", "MmluData", init)
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith(f"moka_pl: error: {path}, line 4: choice 3 of 4 is empty")


def test_text_is_trained_on_and_has_a_perplexity(cli, tmp_path, capsys):
    (tmp_path / "book.txt").write_text("The cat sat on the mat. " * 20)
    init = {"path": "book.txt", "validation_path": "book.txt", "max_length": 64, "batch_size": 4}
    lr = ["--model.optimizer", "torch.optim.AdamW", "--model.optimizer.lr", 0.05]
    cli("fit", "TextData", init, *lr, "--trainer.max_epochs", 4)
    before = capsys.readouterr().out
    assert "perplexity" in before
    cli("validate", "TextData", init, "--model.adapter_path", RUN / "adapters/best")
    assert "text: loss" in capsys.readouterr().out
    found = metrics(1, "validate")["sets"]["text"]
    assert found["tokens"] == 480  # every byte once
    assert found["perplexity"] == pytest.approx(found["byte_perplexity"])  # its tokens are bytes
    assert found["word_perplexity"] > found["perplexity"]
    assert found["loss"] < 5.7  # ln 320, the vocabulary
    assert read_adapter(RUN / "adapters/best").extra["prompt"] == "raw"
