from pathlib import Path

import pytest

from moka_pl.studies.compare import command, drive
from moka_pl.studies.compare.command import main
from moka_pl.studies.compare.runs import frozen_run
from moka_pl.studies.compare.suite import keep_methods, read_suite

FOLDER = Path(__file__).parents[3] / "scripts" / "suites"


def run(*arguments):
    main(FOLDER, [str(argument) for argument in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_wrong_options_end_with_one_line(capsys, tmp_path):
    assert "tiny" in refused(capsys, "--suite", "none")
    wrong = "--set=methods=[{name: a, learning_rates: [0.1], adapter: {component: 1}}]"
    error = refused(capsys, "--suite=tiny", "--set=reference=", wrong)
    assert "method a" in error
    assert "component" in error
    error = refused(capsys, "--suite=tiny", "--set=data.init_args.separate_test=false")
    assert "picked on the test data" in error
    assert "--jobs" in refused(capsys, "--suite=tiny", "--jobs=0")
    assert "--minutes must be above 0" in refused(capsys, "--suite=tiny", "--minutes=0")
    for wrong in ("max_stepss=3", "max_steps=three"):
        error = refused(capsys, "--suite=tiny", f"--out={tmp_path}", f"--set=training.trainer.{wrong}")
        assert "training.trainer" in error
        assert len(error.splitlines()) == 1


def test_data_that_are_not_there_are_refused_before_anything_is_written(capsys, tmp_path):
    out, nowhere = tmp_path / "out", tmp_path / "nowhere"
    (out / "tiny").mkdir(parents=True)
    (out / "tiny" / "suite.json").write_text("what was")
    error = refused(capsys, "--suite=tiny", f"--out={out}", f"--data={nowhere}")
    assert f"{nowhere} does not exist" in error
    assert len(error.splitlines()) == 1
    assert [file.name for file in out.rglob("*")] == ["tiny", "suite.json"]
    assert (out / "tiny" / "suite.json").read_text() == "what was"


def test_a_base_out_of_the_data_needs_their_folder(capsys, tmp_path):
    """A method's own base, too; without that method nothing is missing."""
    options = "--suite=quantisers-smollm2", f"--out={tmp_path}", "--plan"
    assert "suite quantisers-smollm2 needs data; set --data" in refused(capsys, *options)
    run(*options, "--methods", "nf4", "none")
    assert "to do  nf4" in capsys.readouterr().out


def test_a_method_that_a_layer_refuses_is_named_before_any_run(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "_run_here", lambda *arguments: pytest.fail("something ran"))
    adapter = "{components: 16, rank: 16, filters: servable}"
    method = f"--set=methods=[{{name: a, learning_rates: [0.1], adapter: {adapter}}}]"
    error = refused(capsys, "--suite=tiny", "--set=reference=", method, f"--out={tmp_path}")
    assert "tiny: method a: " in error
    assert "q_proj" in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_folders_that_cannot_be_written_to_are_refused_at_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "_run_here", lambda *arguments: pytest.fail("something ran"))
    file = tmp_path / "file"
    file.touch()
    for option in ("--out", "--results"):
        where = ["--suite=tiny", f"--out={tmp_path / 'out'}", f"{option}={file / 'x'}"]
        error = refused(capsys, *where)
        assert f"{option} {file / 'x'}: cannot write there" in error
    assert "--results" in refused(capsys, "--report", f"--out={tmp_path}", f"--results={file}")


def test_the_plan_lists_runs_without_running(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "_executor", lambda store: pytest.fail("something ran"))
    run("--suite", "tiny", "--plan", "--out", tmp_path, "--seeds", 3, "--methods", "MoKA", "--set", "widen=2")
    assert not list(tmp_path.iterdir())
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "to do  frozen base"
    assert lines[1:3] == ["to do  MoKA, lr 0.01, seed 3", "to do  MoKA, lr 0.03, seed 3"]
    assert lines[3].startswith("then 1 runs")
    assert lines[4] == "and up to 2 more learning rates a method of tiny"


def test_an_interrupted_suite_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(drive, "_run_here", stop)
    with pytest.raises(SystemExit) as end:
        run("--suite", "tiny", "--out", tmp_path)
    assert end.value.code == 130
    assert "run the same command again to continue" in capsys.readouterr().err
    assert "not run yet" in (tmp_path / "tiny" / "report.md").read_text()


def test_ctrl_c_before_the_first_run_ends_in_one_line(capsys, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("moka_pl.studies.compare.build.check_suite", stop)
    with pytest.raises(SystemExit) as end:
        run("--suite", "tiny", "--out", tmp_path)
    assert end.value.code == 130
    assert capsys.readouterr().err.split() == ["interrupted"]


def test_reports_are_written_again_from_the_folder_alone(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "_run_here", lambda *arguments: None)
    with pytest.raises(SystemExit) as end:  # nothing has a result
        run("--suite", "tiny", "--out", tmp_path / "out", "--methods", "MoKA", "--data", "sample")
    assert end.value.code == 1
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    run("--report", "--out", tmp_path / "elsewhere", "--results", tmp_path / "results")
    text = (tmp_path / "results" / "tiny" / "report.md").read_text()
    assert "| KronA | not run yet |" in text  # all methods, also those that were left out
    assert "- MoKA, lr 0.01, seed 0" in text
    some = ("--report", "--out", tmp_path / "elsewhere", "--methods", "MoKA", "MoKA_s")
    run(*some, "--results", tmp_path / "pair")  # without the suite's reference every pair is compared
    pair = (tmp_path / "pair" / "tiny" / "report.md").read_text()
    assert "| MoKA_s | not run yet |" in pair
    assert "KronA" not in pair
    assert "--results" in refused(capsys, *some)
    assert "no suite" in refused(capsys, "--report", "--out", tmp_path / "nowhere")


def test_gpus_that_are_not_there_are_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert "only 2 GPUs" in refused(capsys, "--suite=tiny", "--devices=3", "--out", tmp_path)
    assert "0,2" in refused(capsys, "--suite=tiny", "--devices=a", "--out", tmp_path)
    assert [command._devices(text) for text in ("2", "1,", "0,1")] == [[0, 1], [1], [0, 1]]


def test_processes_that_load_data_are_refused_beside_jobs(tmp_path, capsys):
    options = ["--suite=tiny", f"--out={tmp_path}", "--jobs=2", "--set=data.init_args.num_workers=1"]
    assert "set data.init_args.num_workers to 0" in refused(capsys, *options)
    assert not list(tmp_path.iterdir())


def test_the_frozen_base_is_the_same_whichever_methods_are_kept():
    whole = read_suite(FOLDER / "one-layer.yaml")
    (part,) = keep_methods([whole], ["LoRA r1"])
    assert frozen_run(part).key == frozen_run(whole).key
