"""What a model's own files say of it: how it is quantised, and which attention it has."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers as T
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.linear_layers import describe_storage
from moka_pl.backbone.quantization import QuantisedError, is_quantised, quantised_linear
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import BackboneError
from moka_pl.inference import load_base

SIZES = {
    "vocab_size": 261,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Saves a random model of a configuration, with a tokenizer."""

    def write(config: T.PretrainedConfig) -> Path:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        byte_tokenizer().save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return write


@pytest.fixture(params=["nf4", "fp4"])
def quantised(request: pytest.FixtureRequest, save: Callable[..., Path], tmp_path: Path) -> tuple[str, Path]:
    """A checkpoint that is quantised already, without double quantisation."""
    source, folder = save(T.LlamaConfig(**SIZES)), tmp_path / "quantised"
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=request.param)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=config, device_map="cpu")
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return request.param, folder


def test_a_checkpoint_that_is_quantised_already(quantised: tuple[str, Path]) -> None:
    kind, folder = quantised
    loaded = load_backbone(BackboneConfig(str(folder), quantization=kind))
    assert loaded.config is not None
    assert (loaded.config.quantization, loaded.config.double_quantization) == (kind, False)
    assert loaded.notes == [f"{folder} is quantised already: {kind}, as its checkpoint says"]
    assert describe_storage(loaded.model, kind) == f"linear weights {kind}"
    for asked in {"nf4", "fp4", "none"} - {kind}:
        with pytest.raises(QuantisedError, match=f"set --model.backbone.quantization {kind}"):
            load_backbone(BackboneConfig(str(folder), quantization=asked))
        # An adapter that was stored with something else goes on loading.
        stored = load_base(BackboneConfig(str(folder), quantization=asked), "cpu").config
        assert stored is not None
        assert stored.quantization == kind


def test_random_weights_do_not_care_how_a_checkpoint_is_quantised(quantised: tuple[str, Path]) -> None:
    config = BackboneConfig(str(quantised[1]), weights="random", quantization="none")
    assert describe_storage(load_backbone(config).model, "none") == "linear weights none"


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_experts_are_quantised_with_all_else(weights: str, save: Callable[..., Path]) -> None:
    folder = save(T.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    model = load_backbone(BackboneConfig(str(folder), weights=weights, quantization="nf4")).model
    assert describe_storage(model, "nf4") == "linear weights nf4"
    layers = [m for n, m in model.named_modules() if "experts" in n and not list(m.children())]
    assert len(layers) == 2 * 2 * 4
    assert all(map(is_quantised, layers))


@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_conv1d_is_quantised_as_linear_layers_are(weights: str, save: Callable[..., Path]) -> None:
    folder = save(
        T.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=320, bos_token_id=1, eos_token_id=1)
    )
    model = load_backbone(BackboneConfig(str(folder), weights=weights, quantization="nf4")).model
    assert describe_storage(model, "nf4") == "linear weights nf4"
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (64, 192)


def test_experts_that_are_not_quantised_are_said_with_their_share() -> None:
    model = T.MixtralForCausalLM(T.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2))
    for name, layer in list(model.named_modules()):
        if "self_attn." in name and isinstance(layer, torch.nn.Linear):
            new = quantised_linear(layer, layer.weight.detach(), "nf4", True, torch.float32)
            model.set_submodule(name, new)
    experts = sum(p.numel() for n, p in model.named_parameters() if "experts" in n)
    others = sum(p.numel() for n, p in model.named_parameters() if "gate.weight" in n)
    attention = 2 * 2 * 64 * (64 + 32)
    share = (experts + others) / (experts + others + attention)
    line = describe_storage(model, "nf4")
    assert line.startswith(f"linear weights nf4, but {share:.0%} of the weights are not (model.layers.*.mlp.")
    assert "experts" in line


def test_nothing_that_could_be_quantised_is_said() -> None:
    model = T.GPT2LMHeadModel(T.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64))
    assert describe_storage(model, "nf4").startswith("linear weights none, as nf4 cannot store them (")


def test_a_router_loss_is_left_out_and_said(save: Callable[..., Path]) -> None:
    folder = save(T.MixtralConfig(**SIZES, num_local_experts=2, output_router_logits=True))
    loaded = load_backbone(BackboneConfig(str(folder), quantization="none"))
    assert loaded.notes == [f"{folder}: the auxiliary loss of its router is not part of the loss here"]


@pytest.fixture
def no_sdpa(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama's class says that it has no SDPA."""
    monkeypatch.setattr(T.LlamaForCausalLM, "_supports_sdpa", False)


@pytest.mark.usefixtures("no_sdpa")
@pytest.mark.parametrize("weights", ["pretrained", "random"])
def test_a_model_without_sdpa_computes_eagerly_and_says_it(weights: str, save: Callable[..., Path]) -> None:
    folder = save(T.LlamaConfig(**SIZES))
    loaded = load_backbone(BackboneConfig(str(folder), weights=weights, quantization="none"))
    assert loaded.config is not None
    assert loaded.config.options()["attention"] == "eager"
    assert loaded.notes == [f"{folder} does not support attention sdpa; it computes with eager"]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_an_attention_that_does_not_work_names_the_one_that_does(
    attention: str, save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save(T.LlamaConfig(**SIZES))
    monkeypatch.setattr(T.LlamaForCausalLM, "_supports_sdpa", attention == "sdpa")
    with pytest.raises(BackboneError, match=f"set --model.backbone.attention {attention}$"):
        load_backbone(BackboneConfig(str(folder), attention="flash_attention_2", quantization="none"))


def test_a_configuration_that_no_attention_fits_is_not_blamed_on_it(save: Callable[..., Path]) -> None:
    folder = save(T.LlamaConfig(**SIZES))
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_act": "unheard of"}))
    with pytest.raises(BackboneError) as caught:
        load_backbone(BackboneConfig(str(folder), quantization="none"))
    assert "attention" not in str(caught.value)
