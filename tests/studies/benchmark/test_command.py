import subprocess
import sys
from pathlib import Path

import pytest

from moka_pl.studies.benchmark import arguments, command
from moka_pl.studies.benchmark.bench import load_results

SCRIPTS = Path(__file__).parents[3] / "scripts"


def test_a_run(preset, tmp_path, capsys) -> None:
    file = tmp_path / "results.json"
    arguments = ["--preset", preset.name, "--checkpointing", "both", "--steps", "3", "--liger"]
    rows = ["MoKA r10", "frozen base", "MoKA r10 + Liger"]
    command.main([*arguments, "--json", str(file), "--rows", *rows])
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[:2] for line in lines[1:]] == [
        ["| frozen base", "off"],
        ["| MoKA r10", "off"],
        ["| MoKA r10 + Liger", "off"],
        ["| frozen base", "on"],
        ["| MoKA r10", "on"],
        ["| MoKA r10 + Liger", "on"],
    ]
    assert "steps: MoKA r10, checkpointing: " in err
    results = load_results(file)
    assert results.preset["steps"] == 3
    assert results.dtype == "float32"
    assert len(results.records) == 6
    failed = [record for record in results.records if record.error is not None]
    assert [record.row for record in failed] == ["MoKA r10 + Liger"] * 2
    problem = "ConfigError: the base has none of Liger's kernels, which need a GPU and liger-kernel"
    assert {record.error for record in failed} == {problem}
    assert problem in out
    assert problem in err
    assert all(record.values["steps"] == 3 for record in results.records if record.error is None)
    assert results.command == (
        "python scripts/benchmark.py --preset tiny-cpu --checkpointing both --steps 3 --liger "
        "--rows 'MoKA r10' 'frozen base' 'MoKA r10 + Liger'"
    )


def test_growth_is_drawn(preset, results, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(command, "records", lambda plan: results.records)
    folder = tmp_path / "figures"
    command.main(["--preset", preset.name, "--measure", "growth", "--figures", str(folder)])
    out, err = capsys.readouterr()
    assert len(list(folder.iterdir())) == 3
    assert err.count(f"written: {folder}") == 3
    assert "| adapter \\ components |" in out


def test_all_measures_are_made_in_turn(preset, monkeypatch) -> None:
    parser = arguments.make_parser()
    plan = arguments.make_plan(parser.parse_args(["--preset", preset.name, "--measure", "all"]))
    for module, name in (("growth", "grow_components"), ("growth", "grow_tokens"), ("growth", "grow_sizes")):
        monkeypatch.setattr(f"moka_pl.studies.benchmark.{module}.{name}", lambda *args, name=name: [name])
    monkeypatch.setattr(command, "measure_steps", lambda *args: ["steps"])
    monkeypatch.setattr("moka_pl.studies.benchmark.fit.measure_fit", lambda *args: ["fit"])
    monkeypatch.setattr("moka_pl.studies.benchmark.steps.measure_decode", lambda *args: ["decode"])
    made = list(command.records(plan))
    assert made == ["steps", "grow_components", "grow_tokens", "grow_sizes", "fit", "decode"]


def test_results_are_written_row_by_row(preset, tmp_path, monkeypatch, capsys) -> None:
    from moka_pl.studies.benchmark.bench import Record

    file = tmp_path / "results.json"

    def cut_off(plan):
        yield Record("steps", "frozen base", values={"step_ms": 1.0, "peak_gib": 1.0})
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "records", cut_off)
    with pytest.raises(SystemExit) as end:
        command.main(["--preset", preset.name, "--json", str(file)])
    assert end.value.code == 130
    assert f"results so far are saved in {file}" in capsys.readouterr().err
    assert [record.row for record in load_results(file).records] == ["frozen base"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama"], "unknown preset 'llama'; choose one of smollm2-cpu, smollm2-h100"),
        (["--preset", "llama2-7b-h100"], "llama2-7b-h100 needs a CUDA device; choose"),
        (["--rows", "MoKA"], "unknown row 'MoKA'; choose some of frozen base, MoKA r10"),
        (["--rows", "frozen base + Liger"], "unknown row 'frozen base + Liger'"),
        (
            ["--measure", "decode", "--rows", "MoKA r1"],
            "choose some of frozen base, MoKA r10, MoKA servable r16 all linear",
        ),
        (["--steps", "0"], "--steps must be at least 1, not 0"),
        (["--figures", "f"], "--figures draws growth; add --measure growth"),
        (["--json", "/proc/version/x.json"], "cannot write there (/proc/version is a file)"),
        (["--measure", "speed"], "choose from"),
    ],
)
def test_mistakes_are_refused_at_once_in_one_line(arguments, message: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(command, "run", lambda *args: pytest.fail("it began"))
    with pytest.raises(SystemExit) as end:
        command.main(arguments)
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert err.startswith("benchmark: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_rows_with_liger_can_be_named() -> None:
    names = arguments.row_names("cpu", ("steps",), with_liger=True)
    assert names[-2:] == ["frozen base + Liger", "MoKA r10 + Liger"]


def test_rows_on_other_quantisers_are_measured_by_name_alone(preset, monkeypatch) -> None:
    parser = arguments.make_parser()
    chosen: list[list[str]] = []
    monkeypatch.setattr(
        command,
        "measure_steps",
        lambda bench, preset, rows, *_: chosen.append([row.name for row in rows]) or [],
    )
    named = ["MoKA r2 all linear, quantization int8", "MoKA r2 all linear, quantization none"]
    for rows in ([], ["--rows", *named]):
        list(command.records(arguments.make_plan(parser.parse_args(["--preset", preset.name, *rows]))))
    every, by_name = chosen
    assert not [name for name in every if "quantization" in name]
    assert by_name == named


@pytest.mark.parametrize("script", ["benchmark.py", "benchmark_page.py"])
def test_help_is_light(script: str) -> None:
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{script!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPTS / script)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print({'torch', 'transformers', 'lightning', 'matplotlib'} & set(sys.modules))\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("usage: ")
    assert run.stdout.endswith("set()\n")
