"""Measured trainings, with the trainings replaced."""

import json
from pathlib import Path

import pytest

from moka_pl.errors import ConfigError
from moka_pl.studies.ranks import command
from moka_pl.studies.ranks.cases import BLOCK, GROUPS, Case
from moka_pl.studies.ranks.tables import plain_cells


def clock(speed: float, **changes):
    """What a rank writes whose blocks of 600 tokens have a mean speed."""
    stages = {"imported": 103.0, "built": 110.0, "first_step": 112.0}
    blocks = [[600, 600 / (speed * share)] for share in (0.9, 1.0, 1.1)]
    found = {"device": "H", "stages": stages, "begun_at": 0, "ended_at": 8, "position": [0, 0]}
    found |= {"blocks": blocks, "saving": 0.25, "losses": [6.0], "scored": [2], "sums": [5], "peak_gib": 3.5}
    found |= {"steps": {}}
    return found | {"reserved_gib": 4.0} | changes


@pytest.fixture
def runs(monkeypatch):
    """Replaces the commands; returns their options."""
    seen = []
    monkeypatch.setattr(command.time, "time", lambda: 100.0)

    def ended(arguments, output, timeout) -> None:
        options = dict(part.removeprefix("--").split("=", 1) for part in arguments if "=" in part)
        seen.append(options)
        if options["trainer.strategy"] == "broken":
            raise ConfigError("status 1: no memory")
        folder = Path(options["trainer.callbacks.folder"])
        (folder / "last.ckpt").write_bytes(bytes(2_000_000))
        for rank in range(int(options["trainer.devices"])):
            told = clock(100, peak_gib=3.5 + rank, scored=[2 + 2 * rank])
            (folder / f"clock-{rank}.json").write_text(json.dumps(told))

    monkeypatch.setattr(command, "run_to_end", ended)
    return seen


def test_the_median_of_all_ranks_and_their_highest_peak(runs, tmp_path, capsys) -> None:
    file = tmp_path / "rows.json"
    command.main(["--devices", "1", "2", "--strategy", "ddp", "sharded", "--json", str(file)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines == [
        ["llama2-7b", "ddp", "1", "8", "100", "1.00", "3.50", "12.0", "2.0", "0.25"],
        ["llama2-7b", "sharded", "1", "8", "100", "1.00", "3.50", "1.00,", "1.00", "12.0", "2.0", "0.25"],
        ["llama2-7b", "ddp", "2", "8", "200", "2.00", "4.50", "12.0", "2.0", "0.25"],
        ["llama2-7b", "sharded", "2", "8", "200", "2.00", "4.50", "1.00,", "1.00", "12.0", "2.0", "0.25"],
    ]
    rows = json.loads(file.read_text())["rows"]
    assert [row["tokens_per_second"] for row in rows] == pytest.approx([100, 100, 200, 200])
    assert rows[2]["rows"] == [10]
    assert [row["losses"] for row in rows] == [[3.0], [3.0], [2.0], [2.0]]  # over all ranks' tokens
    assert rows[2]["stages"]["built"] == 10
    assert all(options["trainer.max_steps"] == "41" for options in runs)


def test_inputs_of_layers_are_offloaded_where_it_is_asked_for(runs, tmp_path, capsys) -> None:
    file = tmp_path / "rows.json"
    options = "--shape llama2-13b --strategy ddp sharded --devices 2 --batch-size 4 --offload --blocks 4"
    command.main([*options.split(), "--json", str(file)])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert lines[0][:5] == ["llama2-13b", "ddp,", "offload", "2", "4"]
    assert lines[1][1:3] == ["sharded,", "offload"]
    assert "1.00, 1.00" in " ".join(lines[1])  # beside the row of ddp
    assert [options["model.gradient_checkpointing"] for options in runs] == ["offload", "offload"]
    rows = json.loads(file.read_text())["rows"]
    assert [row["offload"] for row in rows] == [True, True]
    other = Case(shape="llama2-13b", devices=2, batch_size=4)
    found = plain_cells(command.measured(other, 9), rows)
    assert found[1:3] == ["ddp", "2"]
    assert found[7] == ""  # rows that offload are no comparison
    assert runs[-1]["model.gradient_checkpointing"] == "true"


def test_rows_of_older_results_have_not_offloaded() -> None:
    row = Case(devices=2).as_dict() | {"tokens_per_second": 90.0, "peak_gib": 3.0, "first_step_seconds": 1.0}
    row |= {"checkpoint_mb": 1.0, "checkpoint_seconds": None}
    older = {name: value for name, value in row.items() if name != "offload"} | {"tokens_per_second": 100.0}
    sharded = row | {"strategy": "sharded"}
    assert plain_cells(sharded, [older, sharded])[7] == "0.90, 1.00"


def test_a_training_that_fails_is_a_row(runs, capsys) -> None:
    command.main(["--devices", "2", "--strategy", "broken", "ddp"])
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[1:])
    assert " ".join(first[4:]) == "status 1: no memory"
    assert second[4] == "200"


def test_nothing_was_measured_if_every_training_fails(runs, tmp_path, capsys) -> None:
    file = tmp_path / "rows.json"
    with pytest.raises(SystemExit) as end:
        command.main(["--devices", "1", "2", "--strategy", "broken", "--json", str(file)])
    assert end.value.code == 1
    assert len(json.loads(file.read_text())["rows"]) == 2
    assert "no training succeeded" in capsys.readouterr().err


def test_a_training_resumes_with_as_many_rows_in_a_step(runs) -> None:
    row = command.measured(Case(strategy="ddp", devices=2, resumes=("sharded", 4)), 9)
    first, second = runs
    assert (first["trainer.strategy"], first["trainer.devices"], first["data.init_args.batch_size"]) == (
        "sharded",
        "4",
        "8",
    )
    assert second["data.init_args.batch_size"] == "16"
    assert second["ckpt_path"] == row["before"]["checkpoint"]
    assert int(second["trainer.max_steps"]) == 2 * int(first["trainer.max_steps"])


def test_profiles_lie_beside_the_results(runs, tmp_path, capsys) -> None:
    file = tmp_path / "rows.json"
    command.main(["--devices", "2", "--json", str(file), "--profile"])
    folder = tmp_path / "rows.profiles" / "llama2-7b-ddp-2x8"
    assert folder.is_dir()
    assert runs[0]["trainer.callbacks.profile"] == runs[0]["trainer.profiler.dirpath"] == str(folder)
    with pytest.raises(SystemExit):
        command.main(["--devices", "2", "--profile"])
    assert "--profile needs --json" in capsys.readouterr().err


def test_as_many_steps_lie_between_two_logs_as_in_a_block(runs) -> None:
    command.measured(Case(), 9)
    assert runs[0]["trainer.log_every_n_steps"] == str(BLOCK)


def test_limits_go_through_the_module_that_sets_them(runs, monkeypatch) -> None:
    commands = []
    inner = command.run_to_end
    monkeypatch.setattr(command, "run_to_end", lambda c, *rest: (commands.append(c), inner(c, *rest)))
    command.measured(GROUPS["limited"][0], 9)
    assert commands[0][1:5] == ["-m", "moka_pl.studies.ranks.limited", "24.0", "fit"]
