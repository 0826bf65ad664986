"""What scripts may write over, and what they refuse before any work."""

import argparse
import ast
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from matplotlib.figure import Figure

from moka_pl import studies
from moka_pl.studies import backends, digits, filters, gates, quantised_checkpoint, reasoning, spectra
from moka_pl.studies.agreement import command as agreement
from moka_pl.studies.benchmark import command as benchmark
from moka_pl.studies.compare import command as compare
from moka_pl.studies.compare.write import check_reports
from moka_pl.studies.long_run import command as long_run
from moka_pl.studies.outputs import has_keys, json_lines_output, json_output, picture_output, save_figure
from moka_pl.studies.ranks import command as ranks
from moka_pl.studies.teachers import command as teachers

RESULTS = Path(__file__).parents[2] / "scripts" / "results"
CHATS = '{"messages": []}\n{"messages": []}\n'

#: The options of scripts for files of their own, with what has to stand beside them.
JSON = {
    "agreement": (agreement.main, ["--data", "x", "--json"]),
    "backends": (backends.main, ["--json"]),
    "benchmark": (benchmark.main, ["--json"]),
    "digits": (digits.main, ["--json"]),
    "filters": (filters.main, ["--config", "x.yaml", "--out"]),
    "long run": (long_run.main, ["--lines"]),
    "ranks": (ranks.main, ["--json"]),
    "spectra": (spectra.main, ["x", "--json"]),
    "teachers": (teachers.main, ["--json"]),
}
PICTURES = {
    "gates": (gates.main, ["x", "--out"]),
    "spectra": (spectra.main, ["x", "--figure"]),
    "teachers": (teachers.main, ["--figure"]),
    "choices": (teachers.main, ["--choices-figure"]),
}


def refused(main, arguments, capsys) -> str:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("script", JSON)
@pytest.mark.parametrize("contents", [CHATS, '[{"instruction": "a"}]', "{}", "# Notes", "1", '{"a": [1]}'])
def test_data_of_the_user_are_not_replaced(script: str, contents: str, tmp_path, capsys) -> None:
    file = tmp_path / "mine.json"
    file.write_text(contents)
    main, options = JSON[script]
    assert f"{options[-1]}: {file} is there already" in refused(main, [*options, file], capsys)
    assert file.read_text() == contents


@pytest.mark.parametrize("script", PICTURES)
def test_pictures_of_the_user_are_not_replaced(script: str, tmp_path, capsys) -> None:
    main, options = PICTURES[script]
    for name, contents in (("mine.png", b"\x89PNG\r\n\x1a\n..."), ("x.png", b"data"), ("y.svg", b"<?xml")):
        file = tmp_path / name
        file.write_bytes(contents)
        assert "is there already" in refused(main, [*options, file], capsys)
        assert file.read_bytes() == contents
    assert "is no picture; give it a name" in refused(main, [*options, tmp_path / "x.docx"], capsys)


@pytest.mark.parametrize(("main", "options"), [*JSON.values(), *PICTURES.values()])
def test_what_is_no_file_is_refused(main, options, tmp_path, capsys) -> None:
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert "is a folder; name a file in it" in refused(main, [*options, folder], capsys)
    (tmp_path / "file").write_text("")
    told = refused(main, [*options, tmp_path / "file" / "new" / "x.png"], capsys)
    assert f"cannot write there ({tmp_path / 'file'} is a file)" in told


def test_the_folder_of_figures_and_the_table_beside_runs(tmp_path, capsys) -> None:
    mine = tmp_path / "growth_tokens.png"
    mine.write_bytes(b"mine")
    growth = ["--measure", "growth", "--figures", tmp_path]
    assert f"{mine} is there already" in refused(benchmark.main, growth, capsys)
    (tmp_path / "README.md").write_text("# Mine")
    assert "README.md is there" in refused(digits.main, ["--json", tmp_path / "README.json"], capsys)
    assert "the table's name" in refused(digits.main, ["--json", tmp_path / "new.md"], capsys)


@pytest.mark.parametrize(
    ("command", "option", "files"),
    [
        (benchmark, "benchmark", "*.json"),
        (ranks, "ranks", "ranks/*.json"),
        (teachers, "teachers", "teachers/*.json"),
        (backends, "backends", "learning/backend_agreement.json"),
        (long_run, "long run", "long_run/*.jsonl"),
        (digits, "digits", "vision/digits.json"),
    ],
)
def test_results_in_the_repository_can_be_written_again(command, option, files, tmp_path, capsys) -> None:
    """The error is of another option: the output is parsed, and no work is begun."""
    known = list(RESULTS.glob(files))
    assert known
    main, options = JSON[option]
    for file in known:
        told = refused(main, [*options, file, "--no-such-option"], capsys)
        assert "unrecognized arguments: --no-such-option" in told


def test_pictures_in_the_repository_can_be_written_again() -> None:
    known = list((RESULTS / "figures").glob("*.png"))
    assert known
    for file in known:
        assert picture_output(str(file)) == file


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_picture_is_written_in_the_format_of_its_name_and_again(suffix: str, tmp_path) -> None:
    file = tmp_path / "new" / f"picture.{suffix}"
    for _ in range(2):
        save_figure(Figure(figsize=(1, 1)), picture_output(str(file)))
    assert [one.name for one in file.parent.iterdir()] == [file.name]


def test_filters_and_spectra_can_be_written_again(tmp_path, capsys) -> None:
    shapes, spectrum = {"q_proj": [[2, 3, 4, 5]]}, dict.fromkeys(spectra.Spectrum._fields, 1)
    for script, content in (("filters", shapes), ("spectra", {"adapter": {"q_proj": spectrum}})):
        file = tmp_path / f"{script}.json"
        file.write_text(json.dumps(content))
        main, options = JSON[script]
        lacking = "--base" if script == "spectra" else "--batches"
        told = refused(main, [*options, file, lacking], capsys)
        assert "expected one argument" in told


def test_nothing_is_lost_with_an_empty_file_and_no_folder_is_made(tmp_path) -> None:
    file = tmp_path / "empty"
    file.write_text("")
    assert json_output(has_keys("a"))(str(file)) == file
    new = tmp_path / "new" / "file"
    assert json_lines_output(has_keys("a"))(str(new)) == new
    assert not new.parent.exists()
    file.write_text('{"a": 1}\n{"b": 1}\n')
    with pytest.raises(argparse.ArgumentTypeError, match="is there already"):
        json_lines_output(has_keys("a"))(str(file))


def test_no_option_for_a_file_of_results_is_a_plain_path() -> None:
    """A new script's ``--json`` or ``--figure`` has a type of ``outputs``."""
    plain = []
    for file in sorted(Path(studies.__file__).parent.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
                name = ast.unparse(node.args[0]).strip("'")
                types = [ast.unparse(word.value) for word in node.keywords if word.arg == "type"]
                if name in ("--json", "--figure", "--figures", "--lines") and types in ([], ["Path"]):
                    plain.append((file.name, name))
    assert not plain


def test_folders_of_the_user_are_not_written_to(tmp_path, capsys) -> None:
    task = tmp_path / "chain_sum" / "test.jsonl"
    task.parent.mkdir()
    task.write_text(CHATS)
    assert f"{task} is there already" in refused(reasoning.main, ["--out", tmp_path], capsys)
    assert [file.name for file in task.parent.iterdir()] == ["test.jsonl"]
    rows = tmp_path / "rows.json"
    rows.write_text('[{"instruction": "a", "output": "b"}]')
    given = ["gptq", "--texts", rows, "--samples", "1", "--out", tmp_path]
    assert "holds files, and no older checkpoint" in refused(quantised_checkpoint.main, given, capsys)


@pytest.mark.parametrize("name", ["families.json", "ranks.md", "tiny/report.md", "tiny/scores.png"])
def test_reports_of_suites_replace_nothing_else(name: str, tmp_path, capsys) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("# Mine")
    suites = lambda arguments: compare.main(RESULTS.parent / "suites", arguments)  # noqa: E731
    told = refused(suites, ["--suite", "tiny", "--out", tmp_path / "out", "--results", tmp_path], capsys)
    assert f"--results: {mine} is there already" in told
    assert mine.read_text() == "# Mine"


def test_reports_in_the_repository_can_be_written_again() -> None:
    folder = RESULTS / "compare"
    reports = [json.loads(file.read_text()) for file in folder.glob("*/report.json")]
    named = {report["suite"]["name"] for report in reports}
    suites = [SimpleNamespace(name=name) for name in sorted(named) if (folder / name / "report.md").is_file()]
    assert len(suites) > 10
    check_reports(suites, folder, "--results")
