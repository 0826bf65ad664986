"""A file of answers, and what an interrupted run leaves of it."""

import json
from pathlib import Path

import pytest

from moka_pl.cli.answering.predictions import Predictions, check_output
from moka_pl.errors import ConfigError


def written(output, answers, run="a"):
    """Adds answers, and finishes where they are three."""
    with Predictions(output, run).opened() as predictions:
        before = dict(predictions.done)
        for number, text in answers:
            predictions.add(number, {"completion": text})
        if len(predictions.done) == 3:
            predictions.finish()
    return before


def test_it_appears_once_it_is_whole_and_in_order(tmp_path):
    output = tmp_path / "answers.jsonl"
    assert written(output, [(2, "c"), (0, "é\u2028")]) == {}
    assert not output.exists()
    assert written(output, [(1, "b")]) == {2: {"completion": "c"}, 0: {"completion": "é\u2028"}}
    lines = output.read_text(encoding="utf-8").split("\n")
    assert [json.loads(line)["completion"] for line in lines[:-1]] == ["é\u2028", "b", "c"]
    assert lines[-1] == ""
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"]


@pytest.mark.parametrize("cut", range(1, 30, 4))
def test_half_a_line_of_a_killed_run_is_dropped(cut, tmp_path):
    output = tmp_path / "answers.jsonl"
    written(output, [(2, "c"), (0, "a")])
    part = Predictions(output, "a").part
    part.write_bytes(part.read_bytes()[:-cut])
    assert written(output, [(0, "a")]) == {2: {"completion": "c"}}
    assert written(output, [(1, "b")]) == {2: {"completion": "c"}, 0: {"completion": "a"}}
    assert output.exists()


@pytest.mark.parametrize("left", [b"", b"\0\xff\n", b"[]\n", b'{"run": "b"}\n{"number": 0}\n', b'{"run":'])
def test_answers_of_another_run_are_not_taken(left, tmp_path):
    output = tmp_path / "answers.jsonl"
    Predictions(output, "a").part.write_bytes(left)
    assert written(output, [(0, "a"), (1, "b"), (2, "c")]) == {}
    assert len(output.read_text().splitlines()) == 3


def test_two_processes_do_not_write_one_file(tmp_path):
    output = tmp_path / "answers.jsonl"
    with Predictions(output, "a").opened(), pytest.raises(ConfigError, match="another process is writing"):
        written(output, [(0, "a")])


def test_what_is_read_is_never_replaced(tmp_path):
    prompts, link = tmp_path / "prompts.jsonl", tmp_path / "link.jsonl"
    prompts.write_text("mine")
    link.symlink_to(prompts)
    for output in (prompts, link, tmp_path / "." / "prompts.jsonl"):
        with pytest.raises(ConfigError, match="is read for the answers; choose another file"):
            check_output(output, True, [tmp_path / "none", prompts])
    with pytest.raises(ConfigError, match="--output - would be a file of that name"):
        check_output(Path("-"), False)
    check_output(tmp_path / "answers.jsonl", True, [prompts])


def test_a_full_disk_keeps_the_older_file(tmp_path, monkeypatch):
    output = tmp_path / "answers.jsonl"
    output.write_text("older\n")

    def full(file):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("moka_pl.cli.answering.predictions.sync_file", full)
    with pytest.raises(ConfigError, match=r"cannot write to .*No space left on device \(.* free\).*the same"):
        written(output, [(0, "a"), (1, "b"), (2, "c")])
    assert output.read_text() == "older\n"
    monkeypatch.undo()
    assert len(written(output, [])) == 3
    assert len(output.read_text().splitlines()) == 3


def test_an_output_that_cannot_be(tmp_path):
    output = tmp_path / "answers.jsonl"
    check_output(output, False)
    output.write_text("")
    check_output(output, True)
    for path, message in {
        output: "is there already; choose another file, or set --overwrite",
        tmp_path: "is a folder; name a file in it",
        output / "x.jsonl": "cannot write there",
    }.items():
        with pytest.raises(ConfigError, match=message):
            check_output(path, False)
