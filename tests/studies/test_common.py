import ast
import json
from pathlib import Path

import pytest

from moka_pl import studies
from moka_pl.errors import ConfigError
from moka_pl.studies import (
    backends,
    digits,
    exports,
    filters,
    mixed_batches,
    quantised_checkpoint,
    reasoning,
    shared_prompt,
    spectra,
)
from moka_pl.studies.agreement import command as agreement
from moka_pl.studies.architectures import command as architectures
from moka_pl.studies.benchmark import batching
from moka_pl.studies.benchmark import command as benchmark
from moka_pl.studies.common import (
    Parser,
    device_name,
    first_line,
    one_line_errors,
    versions,
    write_json,
)
from moka_pl.studies.long_run import command as long_run
from moka_pl.studies.ranks import command as ranks
from moka_pl.studies.ranks import page as ranks_page
from moka_pl.studies.teachers import command as teachers


def test_the_machine() -> None:
    assert "threads)" in device_name("cpu")
    assert {"python", "torch", "transformers", "bitsandbytes", "peft", "lightning"} <= set(versions())
    assert "lm_eval" in versions("lm_eval", "no-such-package")


def test_first_line() -> None:
    assert first_line(ValueError("")) == "ValueError"
    assert first_line(ValueError("\none\ntwo")) == "ValueError: one"
    assert len(first_line(ValueError("word " * 100))) <= 160


def test_an_error_of_the_command_line_is_one_line(capsys) -> None:
    with pytest.raises(SystemExit) as caught:
        Parser("study", "What it does.").parse_args(["--unknown"])
    assert caught.value.code == 2
    assert capsys.readouterr().err == "study: error: unrecognized arguments: --unknown\n"


def test_json_is_there_whole_with_paths_as_text(tmp_path) -> None:
    file = tmp_path / "new" / "file.json"
    for content in ({"α": 1, "file": tmp_path}, {"α": 2, "file": tmp_path}):
        write_json(file, content)
    assert json.loads(file.read_text(encoding="utf-8")) == {"α": 2, "file": str(tmp_path)}
    assert list(file.parent.iterdir()) == [file]
    with pytest.raises(TypeError):
        write_json(file, {"α": object()})


COUNTS = {
    "agreement": (agreement.main, "--items --batch-size --max-length"),
    "backends": (backends.main, "--steps --batch-size --max-length --lr"),
    "benchmark": (benchmark.main, "--steps"),
    "digits": (digits.main, "--seeds --epochs --base-epochs"),
    "exports": (exports.main, "--layers --hidden"),
    "filters": (filters.main, "--batches --parameters"),
    "long run": (long_run.main, "--minutes --components --batch-size --turns --seconds"),
    "mixed batches": (mixed_batches.main, "--rows --adapters --kept --tokens --repeats"),
    "packing": (batching.main, "--batch-size --rows --max-length --examples --rounds"),
    "quantised": (quantised_checkpoint.main, "--samples --max-length --group-size"),
    "ranks": (ranks.main, "--devices --batch-size --blocks --memory-limit --timeout"),
    "reasoning": (reasoning.main, "--train --test"),
    "shared prompt": (shared_prompt.main, "--items --mmlu-items --repeats --batch-size"),
    "teachers": (teachers.main, "--seeds --steps --tokens --first-tokens --components --trained --rates"),
}


@pytest.mark.parametrize("script", COUNTS)
def test_counts_are_at_least_one(script: str, capsys) -> None:
    main, options = COUNTS[script]
    for option in options.split():
        for value in ("0", "-1"):
            with pytest.raises(SystemExit) as end:
                main([f"{option}={value}"])
            assert end.value.code == 2
            err = capsys.readouterr().err
            assert option in err
            assert value in err
            assert err.count("\n") == 1


NOPE = {
    "architectures": (architectures.main, "--write", "No such file"),
    "backends": (backends.main, "--model nope --device cpu --random --steps 1", "nope"),
    "backends on a GPU": (backends.main, "--model nope", "--device gpu: there is no such CUDA device"),
    "filters": (filters.main, "--config nope.yaml --device tpu", "--device tpu: unknown"),
    "mixed batches": (mixed_batches.main, "--base nope", "nope"),
    "packing": (batching.main, "--data nope.jsonl --device cuda", "no such CUDA device"),
    "ranks page": (ranks_page.main, "nope.json", "nope.json: No such file or directory; check the path"),
    "shared prompt": (shared_prompt.main, "nope nope", "nope is no folder"),
    "spectra": (spectra.main, "nope", "nope"),
}


@pytest.mark.parametrize("script", NOPE)
def test_what_is_not_there_is_one_line(script: str, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    main, options, told = NOPE[script]
    with pytest.raises(SystemExit) as end:
        main(options.split())
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert " error: " in err
    assert told in err
    assert err.count("\n") == 1


def test_only_errors_that_a_user_can_mend_are_one_line() -> None:
    @one_line_errors("study")
    def main(error: Exception) -> None:
        raise error

    with pytest.raises(SystemExit):
        main(ConfigError("x"))
    for error in (KeyError("x"), ConnectionError("no number")):
        with pytest.raises(type(error)):
            main(error)


def test_every_command_of_studies_ends_with_one_line() -> None:
    """Its ``main`` has the decorator, with the name of its parser."""
    seen = {}
    for file in sorted(Path(studies.__file__).parent.rglob("*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                wrapped = [ast.unparse(one) for one in node.decorator_list]
                seen[file] = "".join(wrapped).removeprefix("one_line_errors('").removesuffix("')")
    scripts = {file.stem for file in (Path(__file__).parents[2] / "scripts").glob("*.py")}
    assert set(seen.values()) == scripts - {"import_table"}


def test_options_of_scripts_are_spelled_with_dashes() -> None:
    """As argparse's users know them; only the package's own command line has Lightning's names."""
    options = [
        (file.name, given.value)
        for file in sorted(Path(studies.__file__).parent.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument")
        for given in node.args
        if isinstance(given, ast.Constant) and str(given.value).startswith("--")
    ]
    assert ("backends.py", "--batch-size") in options
    assert not [option for option in options if "_" in option[1]]
