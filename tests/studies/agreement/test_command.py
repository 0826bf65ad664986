import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moka_pl.studies.agreement import sides
from moka_pl.studies.agreement.command import main

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_real_model_agrees(
    questions: Path, mmlu: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SmolLM2-135M in float32, with its own tokenizer."""
    test = mmlu / "test" / "astronomy_test.csv"
    test.write_text("".join(test.read_text(encoding="utf-8").splitlines(keepends=True)[:3]), encoding="utf-8")
    file = tmp_path / "agreement.json"
    options = ["--data", questions, "--tasks", "science_easy", "boolean", "--items", 2, "--skip", 1]
    options += ["--mmlu", mmlu, "--subjects", "astronomy", "--json", file, "--no-test"]
    main([str(option) for option in options])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")][2:]
    assert [(row[0].removeprefix("| "), row[1]) for row in rows] == [
        ("science_easy", "2"),
        ("boolean", "2"),
        ("mmlu_astronomy", "1"),
    ]
    for row in rows:
        assert row[2].split(" / ")[0] == row[2].split(" / ")[1]
    content = json.loads(file.read_text(encoding="utf-8"))
    assert all(0 < task["largest"] < 1e-3 and not task["differences"] for task in content["tasks"])
    assert content["versions"].keys() >= {"moka_pl", "lm_eval"}


def test_disagreement_is_status_1(
    questions: Path,
    adapter: Path,
    one_thread: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dataclasses import replace

    package_items = sides.package_items

    def shifted(*args: object) -> list:
        items = package_items(*args)
        scores = [score - 0.01 for score in items[1].log_likelihoods]
        return [items[0], replace(items[1], log_likelihoods=scores), *items[2:]]

    monkeypatch.setattr(sides, "package_items", shifted)
    options = ["--data", questions, "--tasks", "boolean", "--items", 3, "--adapter", adapter, "--no-test"]
    with pytest.raises(SystemExit) as caught:
        main([str(option) for option in options])
    assert caught.value.code == 1
    assert "boolean, item 1: " in capsys.readouterr().out


def test_what_cannot_be_compared_is_status_2(questions: Path, mmlu: Path, adapter: Path, capsys) -> None:
    some = ["--adapter", str(adapter)]
    for options, message in (
        ([], "nothing to compare; give --data, --mmlu, or both"),
        (["--data", questions, "--tasks", "nothing", *some], "nothing/test.json does not exist"),
        (["--data", questions, "--tasks", "boolean", "--skip", 12, *some], "has no questions from number 12"),
        (["--mmlu", mmlu, "--subjects", "law", *some], "law_dev.csv does not exist"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(option) for option in options])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err


def test_the_script_says_what_it_does() -> None:
    script = ROOT / "scripts" / "harness_agreement.py"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script), "--help"], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0
    assert "--items" in result.stdout
