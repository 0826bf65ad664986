"""The merged transformers folder, loaded by transformers alone."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moka_pl.adapters import FullFineTuning, MokaConfig, inject_adapter, merge, unload, unmerge
from moka_pl.backbone.quantization import QuantisedLinear, dense_weight
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.cli.main import main
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.export import merged
from moka_pl.export.check import Measured, measure
from moka_pl.export.folder import marked
from moka_pl.export.memory import on_disk
from moka_pl.export.merged import (
    Part,
    converted,
    folder_size,
    merged_parts,
    write_description,
    write_weights,
)
from moka_pl.export.source import onto_original, open_source


def parts_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {part.name: part.make() for part in merged_parts(model)}


@pytest.mark.parametrize("options", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}])
def test_the_parts_are_the_merged_model(options: dict, make_llama: Callable, randomize: Callable) -> None:
    model = make_llama(**options)
    inject_adapter(model, MokaConfig(components=2))
    randomize(model)
    parts = parts_of(model)
    assert all(tuple(parts[part.name].shape) == part.shape for part in merged_parts(model))
    unload(model, merge=True)
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert parts.keys() == expected.keys()
    assert all(torch.equal(parts[name], tensor) for name, tensor in expected.items())


def test_a_base_that_was_trained_itself_is_its_own_merged_model(make_llama: Callable) -> None:
    model = make_llama()
    inject_adapter(model, FullFineTuning())
    parts = parts_of(model)
    assert all(torch.equal(parts[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize(
    "options", [{}, {"target_modules": ["embed_tokens", "q_proj"]}, {"trainable_token_indices": [3]}], ids=str
)
def test_peft_layers_are_merged(options: dict, make_llama: Callable) -> None:
    peft = pytest.importorskip("peft")
    model = make_llama(tie_word_embeddings=bool(options))
    config = {"target_modules": ["q_proj"], "init_lora_weights": False} | options
    inject_adapter(model, peft.LoraConfig(r=2, **config))
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.normal_(0, 0.3)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        merge(model)
        torch.testing.assert_close(model(ids).logits, expected, atol=1e-4, rtol=1e-4)
        unmerge(model)
        plain, parts = make_llama(seed=1), parts_of(model)
        plain.load_state_dict(parts)
        torch.testing.assert_close(plain(ids).logits, expected, atol=1e-4, rtol=1e-4)


def test_transformers_computes_what_the_adapter_does(
    make_adapter: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(merged, "_SHARD", 100_000)
    adapter = make_adapter()
    main(["export", str(adapter), "--to", "merged", "--dtype", "float16"])
    assert "largest logit difference" in capsys.readouterr().out
    out = adapter.with_name("adapter-merged")
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(out.glob("*.safetensors"))
    assert {file.name for file in files} == set(index["weight_map"].values())
    assert len(files) > 1
    stored = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert stored.keys() == index["weight_map"].keys()
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["dtype"] == "float16"
    assert config["use_cache"] is True
    source = open_source(adapter)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out).float(), AutoTokenizer.from_pretrained(out)
    assert tokenizer("a text").input_ids == source.tokenizer("a text").input_ids
    for ids, logits in zip(source.prompts, source.expected.logits, strict=True):
        with torch.no_grad():
            torch.testing.assert_close(model(ids[None]).logits[0], logits, atol=0.05, rtol=0.05)


def test_8_bit_weights_are_merged_as_they_are(make_adapter: Callable) -> None:
    adapter = make_adapter("int8")
    main(["export", str(adapter), "--to", "merged", "--dtype", "float32"])
    source = open_source(adapter)
    layers = {name: m for name, m in source.model.named_modules() if isinstance(m, QuantisedLinear)}
    written = load_file(adapter.with_name("adapter-merged") / "model.safetensors")
    for name, layer in layers.items():
        if not name.endswith(".base_layer"):
            assert torch.equal(written[f"{name}.weight"], dense_weight(layer))
    assert len(layers) == 14


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_files_are_what_safetensors_writes_of_whole_shards(
    dtype: str, make_adapter: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_disk, "_LARGE", 1000)  # the embedding and the head lie on disk meanwhile
    adapter = make_adapter(target_modules="all-linear")
    main(["export", str(adapter), "--to", "merged", "--dtype", dtype])
    parts = merged_parts(open_source(adapter).model)
    whole = save({part.name: converted(part, getattr(torch, dtype)) for part in parts}, {"format": "pt"})
    written = (adapter.with_name("adapter-merged") / "model.safetensors").read_bytes()
    (head, tensors), (expected_head, expected) = taken_apart(written), taken_apart(whole)
    assert head.pop("__metadata__") == expected_head.pop("__metadata__") | marked("pt")
    assert list(head.items()) == list(expected_head.items())
    assert tensors == expected


def taken_apart(content: bytes) -> tuple[dict, bytes]:
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_an_adapted_head_is_not_tied_any_more(
    make_llama: Callable, randomize: Callable, tmp_path: Path
) -> None:
    from moka_pl.backbone.random_weights import byte_tokenizer

    model = make_llama(tie_word_embeddings=True)
    inject_adapter(model, MokaConfig(components=2, target_modules=["lm_head"]))
    randomize(model)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
        write_weights(tmp_path, merged_parts(model), torch.float32)
        write_description(tmp_path, model, byte_tokenizer(), torch.float32)
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_the_size_of_a_folder_is_known_before_it_is_written(make_llama: Callable, tmp_path: Path) -> None:
    model, tokenizer = make_llama(), byte_tokenizer()
    parts = merged_parts(model)
    write_weights(tmp_path, parts, torch.bfloat16)
    write_description(tmp_path, model, tokenizer, torch.bfloat16)
    written = sum(file.stat().st_size for file in tmp_path.iterdir())
    assert 0.9 * written < folder_size(parts, torch.bfloat16, tokenizer) < 1.5 * written


def test_numbers_beyond_the_dtype_are_refused() -> None:
    part = Part("layer.weight", (1,), lambda: torch.tensor([1e5]))
    assert converted(part, torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(AdapterError, match=r"layer\.weight holds numbers beyond float16"):
        converted(part, torch.float16)


def test_a_model_that_computes_something_else_is_not_left(
    make_adapter: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    source = open_source(adapter)
    monkeypatch.setattr(merged, "converted", lambda part, dtype: converted(part, dtype) * 1.01)
    with pytest.raises(AdapterError, match="the export is not what was trained, and nothing was written"):
        merged.export_merged(source, adapter.with_name("out"), torch.float32)
    assert [path.name for path in adapter.parent.iterdir()] == ["adapter"]


def test_what_does_not_fit_into_memory_is_read_as_it_is_computed(
    make_adapter: Callable, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = []

    def looked_at(model: nn.Module, prompts: list[torch.Tensor]) -> Measured:
        seen.append([p.numel() * p.element_size() for p in model.parameters() if p.device.type == "meta"])
        assert sum(p.numel() * p.element_size() for p in model.parameters() if not p.is_meta) <= 300_000
        return measure(model, prompts)

    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=600_000))
    monkeypatch.setattr(merged, "measure", looked_at)
    adapter = make_adapter()
    merged.export_merged(open_source(adapter), adapter.with_name("out"), torch.float32)
    assert sum(seen[0]) > 150_000
    assert "8 prompts: largest logit difference" in capsys.readouterr().out
    assert sorted(path.name for path in adapter.parent.iterdir()) == ["adapter", "out"]
    assert "offload" not in {path.name for path in adapter.with_name("out").iterdir()}


def test_the_adapters_model_is_gone_when_the_written_one_is_loaded(
    make_adapter: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    source = open_source(adapter)
    model, seen = weakref.ref(source.model), []

    def looked_at(read: nn.Module, prompts: list[torch.Tensor]) -> Measured:
        seen.append(model())
        return measure(read, prompts)

    monkeypatch.setattr(merged, "measure", looked_at)
    merged.export_merged(source, adapter.with_name("out"), torch.float32)
    assert seen == [None]


def test_the_original_weights_are_those_before_quantisation(make_adapter: Callable) -> None:
    adapter = make_adapter()
    source = open_source(adapter)
    original = onto_original(adapter, source, None)
    assert original.expected.loss != source.expected.loss
    assert not any(hasattr(p, "quant_state") for p in original.model.parameters())
    with pytest.raises(ConfigError, match="the base was not quantised in training"):
        onto_original(adapter, open_source(make_adapter(quantization="none")), None)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
    ],
)
def test_readers_of_older_names_find_the_rope(rope: dict, make_llama: Callable, tmp_path: Path) -> None:
    from moka_pl.backbone.random_weights import byte_tokenizer

    write_description(tmp_path, make_llama(rope_parameters=rope), byte_tokenizer(), torch.float32)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["rope_theta"] == 500.0
    older = stored.get("rope_scaling", {"rope_type": "default"})
    assert older == {key: value for key, value in rope.items() if key != "rope_theta"}
    assert AutoConfig.from_pretrained(tmp_path).rope_parameters == rope
