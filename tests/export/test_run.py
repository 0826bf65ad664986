"""What an export does with its base: how it is loaded, and what is left of a run that ends early."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import BitsAndBytesConfig, LlamaForCausalLM, PreTrainedModel

from moka_pl.adapters import BaseModel, MokaConfig, inject_adapter, save_adapter
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone import load as loading
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.cli.main import main
from moka_pl.export import merged, run
from moka_pl.export.memory import on_disk
from moka_pl.inference import load_model

SIZES = {"vocab_size": 320, "hidden_size": 64, "intermediate_size": 128}


@pytest.fixture
def saved(make_llama: Callable, tmp_path: Path, one_thread: None) -> Callable[..., Path]:
    """Saves a random adapter of a base in a folder."""

    def save(config: object, **options: object) -> Path:
        make_llama(**SIZES, attention_bias=True, **options).save_pretrained(tmp_path / "base")
        byte_tokenizer().save_pretrained(tmp_path / "base")
        base = BackboneConfig(str(tmp_path / "base"))
        model = load_backbone(base).model
        inject_adapter(model, config)
        with torch.no_grad():
            for parameter in (p for p in model.parameters() if p.requires_grad):
                parameter.normal_(0, 0.1)
        remembered = BaseModel(base.name, None, fingerprint(model), base.options())
        (tmp_path / "prompts").write_text("one\nand another\n")
        return save_adapter(tmp_path / "adapter", model, config, remembered, {"prompt": "raw"})

    return save


def export(adapter: Path, to: str, *options: str) -> Path:
    out = adapter.with_name("out")
    prompts = ["--prompts", str(adapter.with_name("prompts"))]
    main(["export", str(adapter), "--to", to, "--out", str(out), *prompts, *options])
    return out


def adapters() -> list[object]:
    peft = pytest.importorskip("peft")
    layers = ["q_proj", "up_proj"]
    return [
        MokaConfig(components=2, target_modules=layers),
        peft.LoraConfig(r=2, target_modules=layers),
        peft.LoraConfig(r=2, target_modules=layers, use_dora=True),
    ]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", range(3), ids=["moka", "lora", "dora"])
def test_a_merged_model_is_that_of_the_base_as_it_is_loaded(
    kind: int, tied: bool, saved: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = saved(adapters()[kind], tie_word_embeddings=tied)
    model, _ = load_model(adapter)
    parts = {part.name: part.make() for part in merged.merged_parts(model)}
    monkeypatch.setattr(on_disk, "_LARGE", 1000)
    out = export(adapter, "merged", "--dtype", "float32")
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["tie_word_embeddings"] == tied
    written = LlamaForCausalLM.from_pretrained(out).state_dict()
    assert written.keys() - parts.keys() == ({"lm_head.weight"} if tied else set())
    assert all(torch.equal(written[name], tensor) for name, tensor in parts.items())


def test_a_base_that_is_stored_in_4_bits_leaves_no_word_of_them(saved: Callable, tmp_path: Path) -> None:
    adapter = saved(MokaConfig(components=2))
    options = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    stored = LlamaForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=options, device_map="cpu"
    )
    stored.save_pretrained(tmp_path / "stored")
    byte_tokenizer().save_pretrained(tmp_path / "stored")
    out = export(adapter, "merged", "--base", str(tmp_path / "stored"))
    assert "quantization_config" not in json.loads((out / "config.json").read_text())


@pytest.mark.parametrize("to", ["merged", "lora"])
def test_the_base_is_loaded_as_everywhere(to: str, saved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    adapter, loaded = saved(MokaConfig(components=2, filters="servable")), []
    put = run.put_on_disk
    monkeypatch.setattr(run, "put_on_disk", lambda model, *given: loaded.append(model) or put(model, *given))
    export(adapter, to)
    assert loaded[0].is_loaded_in_4bit  # PEFT, which reads the LoRA back, chooses its layers by it
    assert loaded[0].is_quantized


def test_the_base_of_training_is_gone_before_the_original_is_loaded(
    saved: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = saved(MokaConfig(components=2))
    pretrained, trained, gone = loading._pretrained, [], []

    def original(config: BackboneConfig, *given: object) -> PreTrainedModel:
        if config.quantization == "none":
            gone.extend(model() is None for model in trained)
        return pretrained(config, *given)

    monkeypatch.setattr(run, "put_on_disk", lambda model, *given: trained.append(weakref.ref(model)))
    monkeypatch.setattr(loading, "_pretrained", original)
    out = export(adapter, "merged", "--onto", "original", "--dtype", "float32")
    assert gone == [True]
    assert "on the weights of training, " in capsys.readouterr().out
    written = LlamaForCausalLM.from_pretrained(out).state_dict()
    base = LlamaForCausalLM.from_pretrained(adapter.with_name("base")).state_dict()
    assert {name for name, tensor in base.items() if not torch.equal(tensor, written[name])} == {
        f"model.layers.{i}.self_attn.{own}_proj.weight" for i in range(2) for own in "qv"
    }


@pytest.mark.parametrize("name", ["converted", "write_description", "round_weights", "reloaded"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_export_that_ends_early_leaves_nothing(
    error: type[BaseException], name: str, saved: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*given: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(on_disk, "_LARGE", 1000)  # embedding and head are in their file by then
    adapter = saved(MokaConfig(components=2))
    before = sorted(adapter.parent.iterdir())
    monkeypatch.setattr(merged, name, ended)
    with pytest.raises((error, SystemExit)):
        export(adapter, "merged")
    assert sorted(adapter.parent.iterdir()) == before
