"""The command that watches, with the training replaced."""

import json
from pathlib import Path

import pytest

from moka_pl.errors import ConfigError
from moka_pl.studies.long_run import command

LINE = dict.fromkeys(command._COLUMNS, 1.0) | {"allocated_mib": None}


def test_lines_are_printed_as_they_come(monkeypatch, capsys, tmp_path) -> None:
    def run(arguments, output, timeout) -> None:
        options = dict(part.removeprefix("--").split("=", 1) for part in arguments if "=" in part)
        assert options["trainer.max_time"] == "00:00:01:30"
        lines = [LINE, {"busy": 0.98}]
        Path(options["trainer.callbacks.file"]).write_text("".join(json.dumps(a) + "\n" for a in lines))

    monkeypatch.setattr(command, "run_to_end", run)
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    command.main(["--minutes", "1.5", "--lines", str(tmp_path / "a" / "lines.jsonl")])
    head, row, busy = capsys.readouterr().out.splitlines()
    assert len(row) == len(head)
    assert json.loads(busy) == {"busy": 0.98}


def test_a_training_that_fails_ends_the_command(monkeypatch, capsys) -> None:
    def run(*of_command) -> None:
        raise ConfigError("status 1: no memory")

    monkeypatch.setattr(command, "run_to_end", run)
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit):
        command.main(["--minutes", "0.1"])
    assert "long_run: error: status 1: no memory" in capsys.readouterr().err
