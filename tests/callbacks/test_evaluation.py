import json

import pytest
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, IterableDataset

from moka_pl.callbacks import EvaluationTable
from moka_pl.callbacks.evaluation import results_dict, results_text
from moka_pl.data import MixtureData
from moka_pl.errors import ConfigError
from moka_pl.evaluation.results import Counts, Results, SetCounts


@pytest.fixture
def results():
    tasks = {
        "mmlu_astronomy": Counts(10, 3, 4, 0, 0, 20.0, 10),
        "mmlu_marketing": Counts(20, 10, 5, 0, 0, 15.0, 10),
        "arc": Counts(5.0, 5, 0, 5, 2, 1.0, 4),
        "unseen": Counts(),
    }
    text = SetCounts("text", {}, 8.0, 8.0, 4.0, 16.0)
    groups = {"mmlu_stem": ["mmlu_astronomy"], "mmlu": ["mmlu_astronomy", "mmlu_marketing"]}
    return Results([SetCounts("questions", tasks, 36.0, 24.0), text], groups)


def test_table(results):
    lines = [line.split() for line in results_text(results).splitlines() if line]
    assert lines[0] == ["task", "items", "acc", "(%)", "acc_norm", "(%)", "generated", "(%)", "nll"]
    assert lines[1] == ["mmlu_astronomy", "10", "30.00", "±", "15.28", "40.00", "±", "16.33", "2.0000"]
    assert lines[3] == [
        "arc",
        "5",
        "100.00",
        "±",
        "0.00",
        "0.00",
        "±",
        "0.00",
        "40.00",
        "±",
        "24.49",
        "0.2500",
    ]
    by_name = {" ".join(line[:3]): line for line in lines}
    assert by_name["mmlu, all items"][3:6] == ["30", "43.33", "±"]
    assert by_name["mmlu, mean of"][3:7] == ["2", "tasks", "30", "40.00"]
    assert "mmlu_stem, mean of" not in by_name  # of one task
    assert by_name["mean of 3"][4:6] == ["35", "60.00"]
    assert results_text(results).splitlines()[-1] == (
        "text: loss 1.0000, perplexity 2.7183, word perplexity 7.3891, byte perplexity 1.6487 (8 tokens)"
    )


def test_json(results):
    found = json.loads(json.dumps(results_dict(results)))
    assert list(found["tasks"]) == ["mmlu_astronomy", "mmlu_marketing", "arc"]
    assert found["tasks"]["arc"]["generated"] == 0.4
    assert found["groups"]["mmlu"]["items"] == 30
    counts = [found["groups"]["mmlu"]["items"], found["tasks"]["arc"]["items"]]
    counts += [one["tokens"] for one in found["sets"].values()]
    assert {type(count) for count in counts} == {int}
    assert found["groups"]["mmlu"]["macro"]["accuracy"] == 0.4
    assert found["mean"]["accuracy"] == pytest.approx(0.6)
    assert found["sets"]["text"]["word_perplexity"] == pytest.approx(7.3891, abs=1e-4)


def test_printed_and_written_by_validate_and_test(
    make_module, make_commonsense, make_data, make_trainer, tmp_path, capsys
):
    module, logger = make_module(), CSVLogger(tmp_path)
    data = MixtureData([make_commonsense(), make_data()], eval_batch_size=3)
    trainer = make_trainer(EvaluationTable(), logger=logger)
    trainer.validate(module, data, verbose=False)
    output = capsys.readouterr().out
    assert {"odd", "even"} <= {line.split()[0] for line in output.splitlines() if line}
    written = json.loads((tmp_path / "lightning_logs/version_0/validate.json").read_text())
    assert written["tasks"]["odd"]["items"] == 6
    assert written["tasks"]["odd"]["accuracy"] == module.eval_values["val/accuracy/odd"]
    assert written["base"] == "tiny"
    assert written["partial"] is None
    examples = [(e["set"], e["split"], e["kept"]) for e in written["examples"]]
    assert examples == [("commonsense", "validation", 9), ("instruction", "validation", 5)]
    assert list(written["sets"]) == ["commonsense", "instruction"]
    trainer.test(module, data, verbose=False)
    assert (tmp_path / "lightning_logs/version_0/test.json").is_file()
    assert "test.json" in capsys.readouterr().out


def test_earlier_results_stay(make_module, make_data, make_trainer, tmp_path, capsys):
    module, folder = make_module(), tmp_path / "lightning_logs/version_0"
    folder.mkdir(parents=True)
    (folder / "validate.json").write_text("of an earlier evaluation")
    trainer = make_trainer(EvaluationTable(), logger=CSVLogger(tmp_path, version=0))
    trainer.validate(module, make_data(), verbose=False)
    told = f"Results saved in {folder / 'validate_2.json'}; validate.json there is an earlier evaluation's\n"
    assert capsys.readouterr().out.endswith(told)
    assert (folder / "validate.json").read_text() == "of an earlier evaluation"
    assert json.loads((folder / "validate_2.json").read_text())["command"] == "validate"


@pytest.mark.parametrize("command", ["validate", "test"])
@pytest.mark.parametrize(
    ("limit", "evaluated"), [(1, (1, 1)), (0.5, (1, 1)), (2, (2, 2)), (3, None), (99, None), (1.0, None)]
)
def test_a_part_of_the_data_is_called_so(
    make_module, make_commonsense, make_data, make_trainer, tmp_path, capsys, command, limit, evaluated
):
    """Of 3 batches of one set, and 2 of the other."""
    data = MixtureData([make_commonsense(), make_data()], eval_batch_size=3)
    limits = {"limit_val_batches": limit, "limit_test_batches": limit}
    trainer = make_trainer(EvaluationTable(), logger=CSVLogger(tmp_path), **limits)
    getattr(trainer, command)(make_module(), data, verbose=False)
    told = "Only a part of the data was evaluated. Batches: "
    output = capsys.readouterr().out
    partial = json.loads((tmp_path / f"lightning_logs/version_0/{command}.json").read_text())["partial"]
    if evaluated is None:
        assert partial is None
        assert told not in output
        return
    first, second = evaluated
    assert partial == {
        "commonsense": {"batches": first, "of": 3},
        "instruction": {"batches": second, "of": 2},
    }
    assert f"{told}{first} of 3 of commonsense, {second} of 2 of instruction\n" in output


def test_a_part_of_a_stream_and_a_trial_run(make_module, make_data, make_trainer, tmp_path, capsys):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data.val_dataloader())

    module, data = make_module(), make_data()
    data.connect(module.tokenizer)
    data.setup("validate")
    trainer = make_trainer(EvaluationTable(), logger=CSVLogger(tmp_path), limit_val_batches=1)
    trainer.validate(module, DataLoader(Stream(), batch_size=None), verbose=False)
    written = json.loads((tmp_path / "lightning_logs/version_0/validate.json").read_text())
    assert written["partial"] == {"data": {"batches": 1, "of": None}}
    assert "Batches: 1 of ? of data\n" in capsys.readouterr().out
    make_trainer(EvaluationTable(), fast_dev_run=True).validate(module, data, verbose=False)
    assert "Batches: 1 of 3 of instruction\n" in capsys.readouterr().out


def test_an_evaluation_of_nothing_is_refused(make_module, make_data, make_trainer):
    trainer = make_trainer(EvaluationTable(), limit_val_batches=0)
    with pytest.raises(ConfigError, match=r"trainer\.limit_val_batches is 0: nothing would be evaluated"):
        trainer.validate(make_module(), make_data(), verbose=False)
    trainer = make_trainer(EvaluationTable())
    trainer.test(module := make_module(), make_data(), verbose=False)  # what came before does not count
    nothing = make_data(validation_path=None, validation_share=0)
    with pytest.raises(
        ConfigError, match="nothing was evaluated: InstructionData has no test data; give data"
    ):
        trainer.test(module, nothing, verbose=False)
    with pytest.raises(ConfigError, match="nothing was evaluated: the dataloaders have no validation data"):
        make_trainer(EvaluationTable()).validate(module, DataLoader([]), verbose=False)
    fit = make_trainer(EvaluationTable(), limit_train_batches=1)
    fit.fit(make_module(), nothing)  # which need not validate


def test_silent_while_training_and_without_a_log_folder(
    make_module, make_commonsense, make_trainer, tmp_path, capsys
):
    trainer = make_trainer(EvaluationTable(), num_sanity_val_steps=-1, limit_train_batches=1)
    trainer.fit(make_module(), make_commonsense())
    assert "acc_norm" not in capsys.readouterr().out
    make_trainer(EvaluationTable()).validate(make_module(), make_commonsense(), verbose=False)
    assert "acc_norm" in capsys.readouterr().out
    assert not list(tmp_path.rglob("validate.json"))
