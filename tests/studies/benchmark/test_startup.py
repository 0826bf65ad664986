"""The time from a command to its first step, part by part."""

import json
import py_compile
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from moka_pl.studies.benchmark import startup
from moka_pl.studies.benchmark.startup import PARTS, Stopwatch, timed


def test_each_second_belongs_to_one_part(monkeypatch) -> None:
    now = [100.0]
    monkeypatch.setattr(startup, "time", SimpleNamespace(time=lambda: now[0]))
    monkeypatch.setattr(Stopwatch, "parts", {})
    monkeypatch.setattr(Stopwatch, "last", 100.0)

    def passes(seconds: float) -> float:
        now[0] += seconds
        return seconds

    passes(2)
    Stopwatch.lap("imports")
    passes(1)
    assert timed("model", "trainer", passes)(5) == 5
    passes(0.5)
    Stopwatch.lap("trainer")
    assert Stopwatch.parts == {"imports": 2, "trainer": 1.5, "model": 5}


def test_a_table_with_all_parts(monkeypatch, capsys) -> None:
    asked = []

    def run(command, env, stdout):
        asked.extend(command)
        (file,) = (part.partition("=")[2] for part in command if part.startswith("--trainer.callbacks.file="))
        Path(file).write_text(json.dumps({"imports": 3.0, "model": 1.0}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(startup, "compiled_anew", list)
    startup.main(["--config", "smollm2", "--trainer.max_steps", "4"])
    out = capsys.readouterr().out
    assert "| imports | 3.0 | 75% |" in out
    assert [line.split(" | ")[0].strip("| ") for line in out.splitlines()[2:-2]] == list(PARTS)
    assert asked[3:7] == ["--config", "smollm2", "--trainer.max_steps", "4"]


def test_packages_without_stored_bytecode(monkeypatch, tmp_path, capsys) -> None:
    for name in ("stored", "not_stored"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    monkeypatch.setattr(sys, "pycache_prefix", None)
    py_compile.compile(str(tmp_path / "stored" / "__init__.py"))
    monkeypatch.syspath_prepend(tmp_path)
    names = ["stored", "not_stored", "not_installed"]
    assert startup.compiled_anew(names) == ["not_stored"]

    monkeypatch.setattr(startup, "measure", lambda given: {"imports": 1.0})
    monkeypatch.setattr(startup, "compiled_anew", lambda: ["not_stored"])
    startup.main(["--config", "smollm2"])
    assert "Note: no bytecode of not_stored is stored" in capsys.readouterr().out


def test_a_fit_that_fails_is_one_line(monkeypatch, capsys) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(returncode=2))
    with pytest.raises(SystemExit):
        startup.main(["--config", "smollm2"])
    assert "startup: error: the fit ended with status 2 before its first step" in capsys.readouterr().err


@pytest.mark.slow
def test_a_fit_up_to_its_first_step() -> None:
    options = {
        "model.backbone.name": "tiny",
        "model.backbone.weights": "random",
        "data": "moka_pl.studies.benchmark.probe.SyntheticData",
        "data.length": 8,
        "data.batches": 2,
        "trainer.accelerator": "cpu",
    }
    parts = startup.measure([f"--{name}={value}" for name, value in options.items()])
    assert parts.keys() == set(PARTS)
    assert all(seconds > 0 for seconds in parts.values())
