"""Unsloth's rows: the model written for it, what its process does, and what is said where it fails."""

import io
import json
import os
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark import command, unsloth
from moka_pl.studies.benchmark.bench import Bench, Record, linear_weights
from moka_pl.studies.benchmark.context import Search
from moka_pl.studies.benchmark.tables import beside_unsloth, markdown

HOME = unsloth.Home(python="another")
PACE = {"batch": 2, "length": 8, "warmup": 1, "steps": 2, "seconds": 9.0}


@pytest.fixture
def calls(monkeypatch) -> list[tuple[str, dict]]:
    """A module in the place of unsloth, whose LoRA is PEFT's; returns what it was asked."""
    made = []

    def from_pretrained(folder, **options):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        made.append(("from_pretrained", options))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=options["dtype"], device_map="cpu")
        return model, AutoTokenizer.from_pretrained(folder)

    def get_peft_model(model, **options):
        import peft

        made.append(("get_peft_model", dict(options)))
        if options["r"] == 32:
            raise NotImplementedError("Unsloth: no")
        kept = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules")
        return peft.get_peft_model(model, peft.LoraConfig(**{name: options[name] for name in kept}))

    fake = ModuleType("unsloth")
    fake.FastLanguageModel = SimpleNamespace(from_pretrained=from_pretrained, get_peft_model=get_peft_model)
    monkeypatch.setitem(sys.modules, "unsloth", fake)
    fake.__spec__ = ModuleSpec("unsloth", None)
    return made


@pytest.fixture
def in_process(calls, monkeypatch) -> list[tuple[str, dict]]:
    """Answers what the other process would, through JSON."""

    def ask(home, request):
        assert home == unsloth.Home()
        yield from map(json.loads, map(json.dumps, unsloth.answer_all(json.loads(json.dumps(request)))))

    monkeypatch.setattr(unsloth, "ask", ask)
    return calls


def test_its_model_is_the_benchmark_s(bench, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = bench.built()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    unsloth.write_model(bench, tmp_path)
    assert bench._model is None
    assert not hasattr(model.config, "quantization_config")
    read = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    assert read.config.quantization_config.bnb_4bit_use_double_quant
    found = read.state_dict()
    assert weights.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in weights.items())
    assert len(AutoTokenizer.from_pretrained(tmp_path)) == 260


def test_a_run_with_rows_of_unsloth(preset, in_process, tmp_path, capsys) -> None:
    file = tmp_path / "results.json"
    rows = ["frozen base", "MoKA r10", unsloth.ROWS[0].name, unsloth.ROWS[2].name]
    arguments = ["--preset", preset.name, "--checkpointing", "both", "--unsloth", "--json", str(file)]
    command.main([*arguments, "--rows", *rows])
    out, _ = capsys.readouterr()
    data = json.loads(file.read_text())
    records = [Record(**record) for record in data["records"]]
    theirs = [record for record in records if record.row.startswith("unsloth")]
    assert [(r.row, r.checkpointing) for r in theirs] == [
        (n, kind) for kind in (False, True) for n in rows[2:]
    ]
    assert {r.row: r.error for r in theirs if r.error} == {rows[-1]: "NotImplementedError: Unsloth: no"}
    bases = {r.checkpointing: r.values["step_ms"] for r in records if r.row == "frozen base"}
    for record in theirs[:1]:
        assert record.values["trainable"] > 0
        assert record.values["ratio"] == pytest.approx(record.values["step_ms"] / bases[False])
        rate = 4 * linear_weights("tiny") * 16 / (record.values["step_ms"] * 1e-3) / 1e12
        assert record.values["tflops"] == pytest.approx(rate)
    assert data["command"].count("--unsloth") == 1
    assert len(data["notes"]) == 1
    assert "FastLanguageModel with the same NF4 weights" in data["notes"][0]
    assert "of unsloth's" in out
    kinds = [
        options["use_gradient_checkpointing"] for name, options in in_process if name == "get_peft_model"
    ]
    assert kinds == [False] * 2 + ["unsloth"] * 2
    assert all(
        o["max_seq_length"] == 8 and o["load_in_4bit"] for n, o in in_process if n == "from_pretrained"
    )


def test_the_longest_context_of_its_rows(bench, in_process, monkeypatch) -> None:
    def find_limits(model, make_loss, wanted):
        assert (wanted.seconds, wanted.layers) == (5.0, 4)
        yield 24, {"tokens": 512, "predicted": 512, "peak_gib": 20.0, "step_ms": 1.0}
        if model.peft_config["default"].r == 16:
            raise RuntimeError("an illegal address")
        yield 40, {"tokens": 1024, "predicted": 1024, "peak_gib": 30.0, "step_ms": 2.0}

    monkeypatch.setattr("moka_pl.studies.benchmark.context.find_limits", find_limits)
    wanted = Search((40, 24), 5.0, layers=4)
    note, *records = unsloth.measure_unsloth_context(bench, wanted, [], unsloth.Home())
    assert note.startswith("rows of unsloth")
    found = [(r.row, r.checkpointing, r.setting["gib"], r.values.get("tokens"), r.error) for r in records]
    assert found == [
        ("unsloth LoRA r8 q,v", True, 24, 512, None),
        ("unsloth LoRA r8 q,v", True, 40, 1024, None),
        ("unsloth LoRA r16 all linear", True, 24, 512, None),
        ("unsloth LoRA r16 all linear", True, 40, None, "RuntimeError: an illegal address"),
    ]


def test_without_unsloth_a_note_says_so_and_the_other_rows_run(preset, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "unsloth", None)
    command.main(
        ["--preset", preset.name, "--unsloth", "--steps", "1", "--rows", "frozen base", unsloth.ROWS[0].name]
    )
    out, _ = capsys.readouterr()
    assert "| frozen base | off |" in out
    assert "Note: rows of unsloth are left out: it is not installed; pip install unsloth" in out


def test_its_rows_are_unknown_unless_asked_for(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--rows", "unsloth LoRA r8 q,v"])
    assert "unknown row 'unsloth LoRA r8 q,v'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        ([{"failed": "ImportError: no GPU"}], "ConfigError: unsloth cannot be run: ImportError: no GPU"),
        ([], "its process ended without an answer"),
    ],
)
def test_rows_that_are_not_answered_say_why(answers, message: str, preset, monkeypatch) -> None:
    monkeypatch.setattr(unsloth, "write_model", lambda bench, folder: None)

    def ask(home, request):
        yield {"row": unsloth.ROWS[0].name, "checkpointing": True, "values": {"step_ms": 2.0}, "error": None}
        for answer in answers:
            unsloth.check(answer)

    monkeypatch.setattr(unsloth, "ask", ask)
    records = list(unsloth.measure_unsloth(Bench("tiny", "cpu", True), preset, [True], [], HOME))
    assert [record.error for record in records] == [None, message, message]


def test_what_the_process_prints_does_not_mix_with_its_answers(calls, monkeypatch, tmp_path, capfd) -> None:
    request = {"folder": str(tmp_path), "pace": PACE, "profiled": False, "rows": []}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(request)))
    original = unsloth.answer_all

    def talkative(request):
        os.write(1, b"a banner")
        yield from original(request)
        raise RuntimeError("in the end")

    monkeypatch.setattr(unsloth, "answer_all", talkative)
    unsloth.serve()
    out, err = capfd.readouterr()
    assert "a banner" in err
    about, failed = map(json.loads, out.splitlines())
    assert about["flash_attention"] == "no"
    assert failed == {"failed": "RuntimeError: in the end"}


def test_ratios_are_to_the_row_that_each_competes_with(results) -> None:
    slow = Record("steps", "unsloth LoRA r8 q,v", values={"step_ms": 150.0, "peak_gib": 4.0})
    told = replace(results, records=[*results.records, slow])
    by_name = {(r.row, r.checkpointing): r.values for r in beside_unsloth(told, "steps")}
    assert by_name["MoKA r10", False]["unsloth_ratio"] == pytest.approx(123 / 150)
    assert by_name["MoKA r10", False]["unsloth_peak"] == pytest.approx(0.5)
    assert "unsloth_ratio" not in by_name["MoKA r10", True]
    assert "unsloth_ratio" not in by_name["frozen base", False]
    (fit,) = beside_unsloth(told, "fit")
    assert fit.values["unsloth_ratio"] == pytest.approx(40 / 150)
    assert "| 0.82 | 0.50 |" in markdown(told)
    assert "of unsloth's" not in markdown(results)


@pytest.fixture
def package(tmp_path) -> Path:
    """A folder with a package that calls itself unsloth, and prints."""
    folder = tmp_path / "unsloth"
    folder.mkdir()
    (folder / "__init__.py").write_text("print('patched')\nclass FastLanguageModel: pass\n")
    return tmp_path


def test_where_unsloth_is(package) -> None:
    assert unsloth.Home.parse("") == unsloth.Home(sys.executable, None)
    assert unsloth.Home.parse(str(package)) == unsloth.Home(sys.executable, str(package))
    assert unsloth.Home.parse(sys.executable) == unsloth.Home(sys.executable, None)
    with pytest.raises(ConfigError, match=r"--unsloth .*/no: neither a Python interpreter nor a folder"):
        unsloth.Home.parse(str(package / "no"))


@pytest.mark.slow
def test_a_process_of_its_own(bench, preset, package) -> None:
    home = unsloth.Home.parse(str(package))
    note, *records = unsloth.measure_unsloth(bench, preset, [False], [], home)
    assert note.startswith("rows of unsloth: ")
    assert [record.row for record in records] == [row.name for row in unsloth.ROWS]
    assert all("has no attribute 'from_pretrained'" in record.error for record in records)
