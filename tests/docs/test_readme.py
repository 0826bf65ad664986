"""What the README and the documentation tell people to type works: as far as a CPU and no network can tell.

Commands are parsed by the very parsers that would run them, Python blocks run on a tiny random model, JSON
and YAML blocks are read as the data and configurations that they show. A few commands are run in earnest.
"""

import argparse
import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import yaml
from shared.launchers import without_launcher

from moka_pl.adapters import BaseModel, MokaConfig, adapter_state, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.cli.main import FUNCTIONS, function_parser, main
from moka_pl.data import CommonsenseData, InstructionData

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ON_CPU = [
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.num_nodes=1",
    "--trainer.strategy=auto",
]
#: Programs that are not this project's.
OTHERS = {"llama-cli", "tensorboard", "mkdocs", "mypy", "pre-commit", "ruff"}
LIGHTNING = {"fit", "validate", "test"}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
#: Commands in a sentence or a table; what is cut short there is no command.
INLINE = re.compile(r"`(python (?:-m moka_pl|scripts/)[^`…]*)`")


class Block(NamedTuple):
    page: str
    kind: str
    text: str


def blocks(kind: str) -> list[Block]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        found += [Block(page.relative_to(ROOT).as_posix(), k, t) for k, t in BLOCK.findall(text) if k == kind]
    return found


def commands() -> dict[str, list[list[str]]]:
    """The commands of every page, each as its words."""
    found: dict[str, list[list[str]]] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [
            line
            for kind, block in BLOCK.findall(text)
            if kind == "bash"
            for line in block.replace("\\\n", " ").splitlines()
        ]
        lines += [" ".join(command.split()) for command in INLINE.findall(BLOCK.sub("", text))]
        for line in lines:
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                found.setdefault(page.relative_to(ROOT).as_posix(), []).append(words[:end])
                words = words[end + 1 :]
    return found


COMMANDS = sorted({shlex.join(command) for page in commands().values() for command in page if command})


def save_tiny_adapter(folder: Path, config: MokaConfig) -> Path:
    """Saves an adapter as trained: of random factors and gates."""
    base = BackboneConfig("tiny", weights="random", quantization="none")
    model = load_backbone(base).model
    inject_adapter(model, config)
    for tensor in adapter_state(model).values():
        tensor.normal_(std=0.2)
    remembered = BaseModel(base.name, None, fingerprint(model), base.options())
    return save_adapter(folder / "adapters" / "best", model, config, remembered, {"prompt": "raw"})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny adapter in the place of those that a run would leave."""
    return save_tiny_adapter(tmp_path_factory.mktemp("run"), MokaConfig(components=3))


@pytest.fixture(scope="module")
def servable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with servable filters."""
    config = MokaConfig(components=2, filters="servable", rank=4, target_modules="all-linear")
    return save_tiny_adapter(tmp_path_factory.mktemp("servable"), config)


@pytest.fixture
def placed(adapter: Path, tmp_path: Path) -> dict[str, str]:
    """What stands for something of the user's own, and what it is here."""
    filters = tmp_path / "filters.json"
    filters.write_text(json.dumps({"model.layers.0.self_attn.q_proj": [[8, 8]]}))
    return {"DIR": str(adapter), "RUN/adapters/best": str(adapter), "filters.json": str(filters)}


class Parsed(BaseException):
    """Ends a script once its arguments have been parsed; tells the options that it passes on."""


def parse_script(words: list[str], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Runs a script up to the end of its parser's work; an unknown option ends it with status 2.

    Returns:
        The options that the script passes on to ``fit``.
    """
    parse_args = argparse.ArgumentParser.parse_args
    parse_known = argparse.ArgumentParser.parse_known_args
    strict = []

    def all_known(self: argparse.ArgumentParser, *args: Any, **options: Any) -> None:
        strict.append(self)
        parse_args(self, *args, **options)
        raise Parsed

    def some_known(self: argparse.ArgumentParser, *args: Any, **options: Any) -> Any:
        found = parse_known(self, *args, **options)
        if not strict:
            raise Parsed(*found[1])
        return found

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", all_known)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", some_known)
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(Parsed) as end:
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known)
    return list(end.value.args)


def extras(requirement: str) -> set[str]:
    return set(re.findall(r"[\w-]+", re.search(r"\[(.*)\]", requirement)[1]))


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_can_be_parsed(command: str, placed, build_cli, monkeypatch, capsys) -> None:
    monkeypatch.chdir(ROOT)
    words = [placed.get(word, word) for word in without_launcher(shlex.split(command))]
    match words:
        case ["python", "-m", "moka_pl", name, *rest] if name in FUNCTIONS:
            function_parser(name).parse_args(rest)
        case ["python", "-m", "moka_pl", name, *rest] if name in LIGHTNING:
            if "--print_config" in rest:
                with pytest.raises(SystemExit) as end:
                    build_cli(name, *rest)
                assert end.value.code == 0
                return
            if "last" in rest:  # there is no run to resume here
                rest.remove("--ckpt_path")
                rest.remove("last")
            build_cli(name, *rest, *ON_CPU)
        case ["python", "-m", "moka_pl", "plan", *rest]:
            main(["plan", *rest])  # no more than built: the fixture runs nothing
        case ["python", script, *rest] if script.startswith(("scripts/", "examples/")):
            given = []
            for word in rest:
                given += sorted(map(str, Path().glob(word))) if "*" in word else [word]
            if script.startswith("examples/"):
                assert (ROOT / script).is_file()
            else:
                passed_on = parse_script([script, *given], monkeypatch)
                if passed_on:
                    build_cli("fit", "--config", given[given.index("--config") + 1], *passed_on, *ON_CPU)
        case ["pip", "install", *rest]:
            for requirement in (word for word in rest if not word.startswith("-")):
                assert extras(requirement) <= set(PROJECT["project"]["optional-dependencies"])
        case ["pytest", *rest]:
            markers = [marker.split(":")[0] for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
            assert rest == [] or (rest[0] == "-m" and rest[1] in markers)
        case ["bash", script]:
            assert (ROOT / script).is_file()
        case [program, *_]:
            assert program in OTHERS


def test_there_are_commands_of_every_kind() -> None:
    for start in ("python -m moka_pl fit", "python -m moka_pl generate", "python scripts/", "pip install"):
        assert any(command.startswith(start) for command in COMMANDS)
    assert {"README.md", "docs/data.md", "docs/results.md", "docs/benchmarks.md"} <= commands().keys()


def test_a_wrong_option_would_be_seen(placed, build_cli, monkeypatch, capsys) -> None:
    for command in (
        "python -m moka_pl fit --config configs/smollm2.yaml --model.adapter.ranks 3",
        "python -m moka_pl fit --config configs/no_such.yaml",
        "python -m moka_pl inspect DIR --gate",
        "python scripts/compare.py --suites tiny",
    ):
        with pytest.raises(SystemExit) as end:
            test_a_command_can_be_parsed(command, placed, build_cli, monkeypatch, capsys)
        assert end.value.code == 2
    with pytest.raises(AssertionError):
        test_a_command_can_be_parsed("pip install '.[nothing]'", placed, build_cli, monkeypatch, capsys)


@pytest.mark.parametrize("block", blocks("python"), ids=lambda block: block.page)
def test_python_blocks_run(
    block: Block, adapter: Path, servable: Path, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    if "peft" in block.text:
        pytest.importorskip("peft")
    adapter = servable if "filters: servable" in block.text else adapter
    (tmp_path / "adapters").symlink_to(adapter.parent, target_is_directory=True)
    text = block.text.replace(
        'BackboneConfig("smollm2-135m-instruct")', 'BackboneConfig("tiny", weights="random")'
    )
    text = text.replace('prompt="chat"', 'prompt="alpaca"')  # the tiny model has no chat template
    text = text.replace('dirpath="adapters"', 'dirpath="own"').replace(
        "pl.Trainer(", "pl.Trainer(logger=False, "
    )
    if '"lora"' in text:
        main(["export", "adapters/best", "--to", "lora", "--out", "lora"])
    names: dict[str, Any] = {}
    exec(compile(text, block.page, "exec"), names)
    if "served" in names:  # the LoRA that stands for the adapter is no empty one
        served, tokens = names["served"], names["tokens"]
        with torch.no_grad():
            adapted = served(**tokens).logits
            with served.disable_adapter():
                assert (served(**tokens).logits - adapted).abs().max() > 0.1


@pytest.mark.parametrize("block", blocks("json"), ids=lambda block: block.page)
def test_json_blocks_are_records(block: Block, tmp_path, tokenizer_of_bytes) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(block.text, encoding="utf-8")
    assert [json.loads(line) for line in block.text.splitlines()]
    if '"choices"' in block.text:
        data = CommonsenseData(file, validation_share=0)
    else:
        data = InstructionData(file, validation_share=0, prompt="alpaca")
    data.connect(tokenizer_of_bytes)
    assert data.encode("train") is not None


@pytest.fixture(scope="module")
def tokenizer_of_bytes() -> object:
    return load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).tokenizer


@pytest.mark.parametrize("block", blocks("yaml"), ids=lambda block: block.page)
def test_yaml_blocks_are_parts_of_a_configuration(block: Block, build_cli, tmp_path, monkeypatch) -> None:
    pytest.importorskip("peft")
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(block.text)
    if "adapter" in content:
        content = {"model": content}
    file = tmp_path / "part.yaml"
    content.setdefault("data", {"class_path": "moka_pl.data.InstructionData"})
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    build_cli("fit", "--config", str(file), *ON_CPU)


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


def test_the_readme_s_tables_are_rows_of_the_documentation() -> None:
    told = [(ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("results.md", "benchmarks.md")]
    _, _, measured = (ROOT / "README.md").read_text(encoding="utf-8").partition("## What was measured")
    measured, _, _ = measured.partition("\n## ")
    rows = [line for line in measured.splitlines() if re.match(r"\| [\w(]", line) and "trainable" not in line]
    assert len(rows) > 10
    for row in rows:
        assert any(row in text.splitlines() for text in told), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if path.startswith("http"):
            continue
        file = (page.parent / path) if path else page
        assert file.exists(), target
        if anchor and file.suffix == ".md":
            heads = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["-m", "moka_pl", "inspect", "DIR"],
        ["-m", "moka_pl", "generate", "DIR", "What is snow?", "--compare", "--max_new_tokens", "3"],
        ["-m", "moka_pl", "validate", "--config", "configs/smollm2.yaml", "--model.adapter_path", "DIR"],
        ["scripts/compare.py", "--suite", "tiny"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_command_runs(words: list[str], placed, tmp_path, monkeypatch) -> None:
    words = [placed.get(word, word) for word in words]
    if words[2:3] == ["validate"]:  # the configuration's base gives way to the tiny adapter's
        words += ["--model.backbone.name", "tiny", "--model.backbone.weights", "random"]
        words += ["--model.backbone.quantization", "none", "--trainer.logger", "false", *ON_CPU]
    if words[0].endswith("compare.py"):
        words += ["--out", str(tmp_path / "out")]
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
