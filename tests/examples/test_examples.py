"""Runs the examples, on tiny random models where they take a model."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moka_pl import BackboneConfig, load_backbone, load_model
from moka_pl.adapters import adapter_state

FOLDER = Path(__file__).parents[2] / "examples"
TINY = BackboneConfig("tiny", weights="random", quantization="none")


def imported(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"examples_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook: Path) -> list[str]:
    content = json.loads(notebook.read_text(encoding="utf-8"))
    assert content["nbformat"] == 4
    ids = [cell["id"] for cell in content["cells"]]
    assert len(ids) == len(set(ids))
    for cell in content["cells"]:
        if cell["cell_type"] == "code":  # committed without results
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
    return ["".join(cell["source"]) for cell in content["cells"] if cell["cell_type"] == "code"]


def test_scripts_are_short_and_all_run_here() -> None:
    scripts = {file.stem: file.read_text(encoding="utf-8") for file in FOLDER.glob("*.py")}
    assert set(scripts) == {"generate", "hf_trainer", "plain_loop", "train", "trl_sft"}
    assert all(len(text.splitlines()) <= 40 for text in scripts.values())


def test_train_and_generate(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    adapter = imported("train").train(TINY, tmp_path / "adapters", prompt="alpaca")
    assert (adapter / "adapter_model.safetensors").is_file()
    assert "trainable parameters" in capsys.readouterr().out
    found = imported("generate").answers(adapter, "What is snow?", max_new_tokens=3)
    assert set(found) == {"adapted", "base"}
    assert "self_attn.q_proj" in capsys.readouterr().out


def test_the_plain_loop_learns() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, initializer_range=0.2, **sizes))
    losses = imported("plain_loop").adapt(model, torch.arange(20)[None], steps=20)
    assert losses[-1] < losses[0] / 2


@pytest.fixture
def tiny_folder(tmp_path: Path) -> Path:
    """A folder with a tiny model and its tokenizer."""
    base = load_backbone(TINY)
    base.model.save_pretrained(tmp_path / "base")
    base.tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


#: A training of a second.
SHORT = {"max_steps": 6, "per_device_train_batch_size": 4, "logging_steps": 1}


@pytest.mark.slow
def test_transformers_trainer(tmp_path, tiny_folder) -> None:
    model, tokenizer = (k.from_pretrained(tiny_folder) for k in (AutoModelForCausalLM, AutoTokenizer))
    train, options = imported("hf_trainer").train, SHORT | {"learning_rate": 3e-2, "save_steps": 3}
    trainer = train(model, tokenizer, ["snow is cold"] * 8, tmp_path / "out", **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded, _ = load_model(tmp_path / "out", device="cpu")
    assert all(torch.equal(t, adapter_state(model)[name]) for name, t in adapter_state(loaded).items())
    # Called again, it goes on from its last checkpoint.
    model = AutoModelForCausalLM.from_pretrained(tiny_folder)
    options |= {"max_steps": 8}
    trainer = train(model, tokenizer, ["snow is cold"] * 8, tmp_path / "out", **options)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == list(range(1, 9))


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_trl(quantization: str, tmp_path, tiny_folder) -> None:
    pytest.importorskip("trl")
    base = load_backbone(BackboneConfig(str(tiny_folder), quantization=quantization))
    example = imported("trl_sft")
    options = SHORT | {"learning_rate": 3e-2, "max_length": 64}
    trainer = example.train(base.model, base.tokenizer, example.SUMS[:8], tmp_path / "out", **options)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    loaded, _ = load_model(tmp_path / "out", device="cpu")
    trained = adapter_state(base.model)
    assert all(torch.equal(t, trained[name].float()) for name, t in adapter_state(loaded).items())


@pytest.mark.parametrize("notebook", sorted(FOLDER.glob("*.ipynb")), ids=lambda file: file.stem)
def test_notebooks_run(notebook: Path) -> None:
    cells = code_cells(notebook)
    assert cells
    names: dict[str, object] = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"{notebook.name}[{number}]", "exec"), names)
