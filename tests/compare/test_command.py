from pathlib import Path

import pytest

from moka_pl.compare import drive
from moka_pl.compare.command import main

FOLDER = Path(__file__).parents[2] / "scripts" / "suites"


def run(*arguments):
    main(FOLDER, [str(argument) for argument in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        run(*arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_wrong_options_end_with_one_line(capsys, tmp_path):
    assert "tiny" in refused(capsys, "--suite", "none")
    wrong = "--set=rivals=[{name: a, learning_rates: [0.1], adapter: {component: 1}}]"
    error = refused(capsys, "--suite=tiny", "--set=reference=", wrong)
    assert "rival a" in error
    assert "component" in error
    error = refused(capsys, "--suite=tiny", "--set=data.init_args.separate_test=false")
    assert "picked on the test data" in error
    assert "--jobs" in refused(capsys, "--suite=tiny", "--jobs=0")


def test_the_plan_lists_runs_without_running(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(drive, "_executor", lambda store: pytest.fail("something ran"))
    run("--suite", "tiny", "--plan", "--out", tmp_path, "--seeds", 3, "--rivals", "MoKA")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "to do  frozen base"
    assert lines[1:3] == ["to do  MoKA, lr 0.01, seed 3", "to do  MoKA, lr 0.03, seed 3"]
    assert lines[3].startswith("then 1 runs")


def test_an_interrupted_suite_says_how_to_go_on(capsys, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(drive, "_here", stop)
    with pytest.raises(SystemExit) as end:
        run("--suite", "tiny", "--out", tmp_path)
    assert end.value.code == 130
    assert "the same command goes on" in capsys.readouterr().err
    assert "not run yet" in (tmp_path / "tiny" / "report.md").read_text()
