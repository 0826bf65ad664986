"""Base models in a local folder."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging

from moka_pl.backbone import BackboneConfig, load_backbone, load_tokenizer
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import BackboneError


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


def failure(name: str | Path, **options: object) -> str:
    with pytest.raises(BackboneError) as caught:
        load_backbone(BackboneConfig(str(name), **options))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    return str(caught.value)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_it_loads_as_if_quantised_by_hand(
    quantization: str, double: bool, model_folder: Path, dense: LlamaForCausalLM, ids: Tensor
) -> None:
    config = BackboneConfig(str(model_folder), quantization=quantization, double_quantization=double)
    loaded = load_backbone(config)
    exact = logits(dense, ids)
    with torch.no_grad():
        for name, layer in dense.named_modules():
            if isinstance(layer, nn.Linear) and name != "lm_head":
                packed, state = bnb.functional.quantize_4bit(
                    layer.weight.detach(), quant_type=quantization, compress_statistics=double
                )
                layer.weight.copy_(bnb.functional.dequantize_4bit(packed, state))
    torch.testing.assert_close(logits(loaded.model, ids), logits(dense, ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(loaded.model, ids), exact, atol=1e-2)
    quantised = [name for name, m in loaded.model.named_modules() if isinstance(m, Linear4bit)]
    assert len(quantised) == 7
    assert not loaded.model.training
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_unquantised_weights_are_exact(model_folder: Path, dense: LlamaForCausalLM, ids: Tensor) -> None:
    loaded = load_backbone(BackboneConfig(str(model_folder), quantization="none"))
    torch.testing.assert_close(logits(loaded.model, ids), logits(dense, ids))
    low = load_backbone(BackboneConfig(str(model_folder), quantization="none", compute_dtype="bfloat16"))
    assert {parameter.dtype for parameter in low.model.parameters()} == {torch.bfloat16}


def test_random_weights_take_the_folders_shape_and_tokenizer(
    model_folder: Path, dense: LlamaForCausalLM
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.add_tokens(["<one more>"])
    tokenizer.save_pretrained(model_folder)
    loaded = load_backbone(BackboneConfig(str(model_folder), weights="random", quantization="none"))
    assert len(loaded.tokenizer) == 261
    own, drawn = dense.model.embed_tokens.weight, loaded.model.get_input_embeddings().weight
    assert own.shape == drawn.shape
    assert not torch.allclose(own, drawn)


def test_a_folder_below_home(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(model_folder.parent))
    assert load_backbone(BackboneConfig("~/model")).model.config.hidden_size == 64


@pytest.mark.parametrize("eos", ["<|end|>", None])
def test_a_tokenizer_without_padding_token_gets_one(eos: str | None, model_folder: Path) -> None:
    file = model_folder / "tokenizer_config.json"
    options = json.loads(file.read_text()) | {"pad_token": None, "eos_token": eos}
    file.write_text(json.dumps({key: value for key, value in options.items() if value is not None}))
    assert AutoTokenizer.from_pretrained(model_folder).pad_token is None
    tokenizer = load_tokenizer(BackboneConfig(str(model_folder)))
    assert tokenizer.pad_token == (eos or "<|pad|>")
    assert tokenizer(["a", "abc"], padding=True)["attention_mask"][0] == [1, 0, 0]


def test_a_padding_token_of_its_own_stays(model_folder: Path) -> None:
    tokenizer = load_tokenizer(BackboneConfig(str(model_folder)))
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<|pad|>", "<|end|>")


def test_the_users_progress_bar_setting_stays(model_folder: Path) -> None:
    for setting in (logging.disable_progress_bar, logging.enable_progress_bar):
        setting()
        before = logging.is_progress_bar_enabled()
        load_backbone(BackboneConfig(str(model_folder)))
        assert logging.is_progress_bar_enabled() == before


def test_a_folder_without_config(tmp_path: Path) -> None:
    assert failure(tmp_path) == f"{tmp_path} is not a model folder: it has no config.json"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "~/nothing", "a/b/c"])
def test_a_folder_that_does_not_exist_is_not_looked_up(name: str) -> None:
    assert failure(name) == f"{name}: no such model folder; check the path"


def test_an_address_is_no_name() -> None:
    told = failure("https://huggingface.co/organisation/model")
    assert told.endswith(": addresses are not read; give the hub id, as in organisation/model, or a folder")


def test_the_name_of_a_shape_has_no_weights() -> None:
    assert "set weights: random" in failure("llama2-7b")


@pytest.mark.parametrize("size", [0, 100, 40_000])
def test_truncated_weights(size: int, model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    assert failure(model_folder).startswith(f"{model_folder} cannot be loaded: ")


def test_absent_weights(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    assert "it has no weights (model.safetensors or pytorch_model.bin)" in failure(model_folder)


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_missing_tensors_are_not_made_up(quantization: str, model_folder: Path) -> None:
    file = model_folder / "model.safetensors"
    tensors = load_file(file)
    for name in ("up_proj", "down_proj"):
        del tensors[f"model.layers.0.mlp.{name}.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    message = failure(model_folder, quantization=quantization)
    assert "2 of its weights are missing (first model.layers.0.mlp.down_proj.weight)" in message


def test_weights_of_another_shape(model_folder: Path) -> None:
    file = model_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"intermediate_size": 128}))
    assert failure(model_folder, quantization="none").startswith(f"{model_folder} cannot be loaded: ")


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_damaged_json(file: str, model_folder: Path) -> None:
    (model_folder / file).write_text("{")
    assert failure(model_folder).startswith(f"{model_folder} cannot be loaded: ")


def test_no_tokenizer(model_folder: Path) -> None:
    for file in model_folder.glob("tokenizer*"):
        file.unlink()
    told = f"{model_folder} cannot be loaded: it has no tokenizer.json (or tokenizer.model); copy it from"
    assert failure(model_folder).startswith(told)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"version": "1.0", "tru', r"tokenizer.json is damaged \(Unterminated string .*\); copy it again$"),
        ("[]", r"tokenizer.json is damaged \(it holds no object\)"),
        (
            "version https://git-lfs.github.com/spec/v1\noid",
            "tokenizer.json is only Git LFS's pointer .*git lfs",
        ),
    ],
)
def test_a_damaged_tokenizer(text: str, told: str, model_folder: Path) -> None:
    (model_folder / "tokenizer.json").write_text(text)
    assert re.search(told, failure(model_folder))


@pytest.fixture
def shards(model_folder: Path, dense: LlamaForCausalLM) -> list[Path]:
    """The weight files of the folder, now several with an index."""
    (model_folder / "model.safetensors").unlink()
    dense.save_pretrained(model_folder, max_shard_size="100KB")
    found = sorted(model_folder.glob("model-*.safetensors"))
    assert len(found) > 2
    return found


def lose(shards: list[Path]) -> None:
    shards[1].unlink()


def cut(shards: list[Path]) -> None:
    shards[1].write_bytes(shards[1].read_bytes()[:-10])


def swap(shards: list[Path]) -> None:
    shards[1].write_bytes(shards[0].read_bytes())


def leave_pointer(shards: list[Path]) -> None:
    shards[1].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lose, "model-00002-of-.*, which model.safetensors.index.json names, is not there; copy or download"),
        (cut, "model-00002-of-.* is damaged"),
        (swap, "model-00002-of-.* has no model.*, which model.safetensors.index.json says it has"),
        (
            leave_pointer,
            "model-00002-of-.* is only Git LFS's pointer to the file; run git lfs pull in .*model$",
        ),
    ],
)
def test_damaged_weights_show_before_anything_is_encoded(
    damage: Callable, told: str, shards: list[Path]
) -> None:
    config = BackboneConfig(str(shards[0].parent))
    assert load_tokenizer(config)
    damage(shards)
    with pytest.raises(BackboneError, match=f"cannot be loaded: {told}"):
        load_tokenizer(config)
    assert load_tokenizer(config, weights=False)  # to plan, they need not be here


def test_an_index_beside_the_one_file_says_nothing(model_folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "model-00001-of-00009.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load_tokenizer(BackboneConfig(str(model_folder)))


def test_random_weights_need_no_files(model_folder: Path) -> None:
    (model_folder / "model.safetensors").unlink()
    assert load_tokenizer(BackboneConfig(str(model_folder), weights="random"))


def test_a_model_of_another_kind(model_folder: Path) -> None:
    file = model_folder / "config.json"
    file.write_text(json.dumps({"model_type": "t5"}))
    assert "CausalLM" in failure(model_folder)


def test_prompts_and_ends_are_those_of_training(model_folder: Path) -> None:
    tokenizer = byte_tokenizer()
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=["$A", end[0]], special_tokens=[end]
    )
    tokenizer.save_pretrained(model_folder)
    file = model_folder / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": 7}))
    loaded = load_backbone(BackboneConfig(str(model_folder), quantization="none"))
    assert loaded.tokenizer("ab").input_ids == loaded.tokenizer("ab", add_special_tokens=False).input_ids
    ends = loaded.model.generation_config.eos_token_id
    assert ends == [7, *tokenizer.convert_tokens_to_ids([end[0], "<|im_end|>"])]
