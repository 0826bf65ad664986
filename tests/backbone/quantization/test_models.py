"""Whole models in kinds of quantised weights that are made layer by layer: loaded, told apart, trained."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from shared.quantisers import PACKAGES
from torch import nn
from transformers import LlamaForCausalLM

from moka_pl.adapters import adapter_state
from moka_pl.backbone import BackboneConfig, load_backbone, weight_samples
from moka_pl.backbone.blocks.frozen_tensors import decoder_blocks
from moka_pl.backbone.fingerprint import compare_samples
from moka_pl.backbone.load import Unloaded
from moka_pl.backbone.quantization import (
    QuantisedLinear,
    base_bytes,
    dense_weight,
    quantised_linear,
    quantization_of,
    weight_bytes,
)
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import BackboneError
from moka_pl.training.sharding.blocks import ShardedBlocks


@pytest.fixture
def dense(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128}
    return make_llama(**sizes, tie_word_embeddings=True, attention_bias=True)


@pytest.fixture
def folder(dense: LlamaForCausalLM, tmp_path: Path) -> str:
    dense.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def layers(model: nn.Module) -> dict[str, QuantisedLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, QuantisedLinear)}


def test_each_layer_is_quantised_as_it_is_read(folder: str, kind: str, dense: LlamaForCausalLM) -> None:
    seen: list[Unloaded] = []
    loaded = load_backbone(BackboneConfig(folder, quantization=kind), before=seen.append)
    assert all(parameter.is_meta for parameter in seen[0].model.parameters())
    assert quantization_of(loaded.model) == (kind, True)
    found = layers(loaded.model)
    assert len(found) == 14
    for name, layer in found.items():
        own = dense.get_submodule(name)
        made = quantised_linear(own, own.weight.detach(), kind, True, torch.float32)
        assert torch.equal(dense_weight(layer), dense_weight(made))
        own.weight.data = dense_weight(made)
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
    biases = sum(layer.bias.nbytes for layer in found.values() if layer.bias is not None)
    nbytes = sum(map(base_bytes, found.values())) - biases
    weights = sum(layer.stored.shape.numel() for layer in found.values())
    # Small layers have a larger share of scales.
    assert nbytes / weights == pytest.approx(weight_bytes(kind, True, torch.float32), rel=0.1)


def test_conv1d_and_what_is_not_in_one_piece_is_quantised_too(kind: str, tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 64, "n_layer": 1, "n_head": 2, "vocab_size": 260, "n_positions": 32}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1)).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert len(layers(load_backbone(BackboneConfig(str(tmp_path), quantization=kind)).model)) == 4


def test_blocks_can_be_kept_elsewhere(folder: str, kind: str) -> None:
    config = BackboneConfig(folder, quantization=kind)
    whole = load_backbone(config).model
    blocks = ShardedBlocks(None, None, offload=True, device=torch.device("cpu"))
    model = load_backbone(config, blocks=blocks).model
    assert weight_samples(model, ready=blocks.reading(model)) == weight_samples(whole)
    gradients = []
    for one in (model, whole):
        inputs = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        one(inputs_embeds=inputs).logits.square().mean().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)
    blocks.end_step()
    for layer in layers(next(iter(decoder_blocks(model).values()))).values():
        assert layer.weight.numel() == 0
        with pytest.raises((RuntimeError, AttributeError, TypeError)):
            layer(torch.ones(1, layer.in_features))


def test_samples_tell_the_same_base_and_another(folder: str, kind: str, make_llama: Callable) -> None:
    def samples(quantization: str) -> str:
        return weight_samples(load_backbone(BackboneConfig(folder, quantization=quantization)).model)

    own = samples(kind)
    assert own.startswith(f"{kind}-")
    stored = {name: samples(name) for name in ("none", "nf4", "fp4")}
    for other in (own, *stored.values()):
        found = compare_samples(own, other)
        assert found is not None
        assert found.different == 0
    changed = load_backbone(BackboneConfig(folder, quantization="none")).model
    with torch.no_grad():
        changed.model.layers[0].mlp.up_proj.weight.normal_()
    changed.save_pretrained(folder)
    found = compare_samples(own, samples(kind))
    assert found is not None
    assert found.different == 1


@pytest.mark.parametrize(
    "kind", ["int8", *(pytest.param(kind, marks=pytest.mark.slow) for kind in PACKAGES)], indirect=True
)
def test_a_resumed_run_equals_one_never_stopped(
    kind: str, make_module: Callable, make_data: Callable, make_trainer: Callable, tmp_path: Path
) -> None:
    from lightning.pytorch.callbacks import ModelCheckpoint

    base = BackboneConfig("tiny", weights="random", quantization=kind)

    def fit(ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
        module = make_module(backbone=base, adapter={"dropout": 0.1})
        saving = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, every_n_train_steps=2)
        trainer = make_trainer(saving, enable_checkpointing=True, max_steps=4, limit_val_batches=0)
        trainer.fit(module, make_data(), ckpt_path=ckpt_path, weights_only=True)
        assert layers(module.causal_lm)
        return adapter_state(module.causal_lm)

    whole = fit()
    resumed = fit(next(tmp_path.glob("step=2.ckpt")))
    assert any(float(tensor.abs().max()) > 0 for name, tensor in whole.items() if "moka_B" in name)
    assert all(torch.equal(whole[name], tensor) for name, tensor in resumed.items())


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    for kind, package in PACKAGES.items():
        monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
        for part in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, part)
        expected = rf"{kind} needs {package} \(.*\): pip install '.*\[{package}\]'"
        with pytest.raises(BackboneError, match=expected):
            load_backbone(BackboneConfig(folder, quantization=kind))


def test_layers_of_other_sizes_are_refused_before_they_are_read(make_llama: Callable, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    make_llama(vocab_size=260, hidden_size=40).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    seen: list[Unloaded] = []
    expected = r"int4 cannot store model.layers.0.self_attn.q_proj of 40 × 40: .* of 16 entries; set .* nf4"
    with pytest.raises(BackboneError, match=expected):
        load_backbone(BackboneConfig(str(tmp_path), quantization="int4"), before=seen.append)
    assert not seen
