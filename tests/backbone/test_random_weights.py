"""Models with random weights: what they compute, and how little memory building them takes."""

import gc
import json
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from moka_pl.backbone import BackboneConfig, load_backbone, load_tokenizer
from moka_pl.backbone.blocks import filling
from moka_pl.backbone.quantization import dense_weight
from moka_pl.backbone.random_weights import SHAPES, shape_config
from moka_pl.errors import BackboneError

PARAMETERS = {
    "llama2-7b": 6_738_415_616,
    "llama2-7b-odd": 6_713_156_624,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-1b": 1_235_814_400,
    "smollm2-135m": 134_515_008,
    "tiny": 2 * 320 * 64 + 2 * (64 * (64 + 32 + 32 + 64) + 3 * 64 * 128 + 2 * 64) + 64,
}


def tiny(**options: object) -> nn.Module:
    return load_backbone(BackboneConfig("tiny", weights="random", **options)).model


def dense_copy(model: nn.Module) -> LlamaForCausalLM:
    """A plain float32 model with the dequantised weights of ``model``."""
    copy = LlamaForCausalLM(model.config).eval()
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                copy.get_submodule(name).weight.copy_(dense_weight(module))
            elif isinstance(getattr(module, "weight", None), nn.Parameter):
                copy.get_submodule(name).weight.copy_(module.weight)
    return copy


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
def test_the_same_seed_gives_the_same_weights(quantization: str, ids: Tensor) -> None:
    first, same, other = (tiny(quantization=quantization, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(logits(first, ids), logits(same, ids))
    assert not torch.allclose(logits(first, ids), logits(other, ids))
    embedding, others = first.get_input_embeddings().weight, other.get_input_embeddings().weight
    assert not torch.equal(embedding, others)


def test_the_seed_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    tiny()
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_dtype_holds_the_same_weights(dtype: str) -> None:
    # An adapter on a random base loads on a device with another best dtype.
    wide, low = tiny(quantization="none"), tiny(quantization="none", compute_dtype=dtype)
    for (name, expected), (_, found) in zip(wide.named_parameters(), low.named_parameters(), strict=True):
        assert torch.equal(found, expected.to(found.dtype)), name


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_are_stored_in_4_bits(quantization: str, double: bool, dtype: str) -> None:
    model = tiny(quantization=quantization, double_quantization=double, compute_dtype=dtype)
    dtype = getattr(torch, dtype)
    linear = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert type(linear.pop("lm_head")) is nn.Linear
    assert model.lm_head.weight.dtype == model.get_input_embeddings().weight.dtype == dtype
    assert len(linear) == 2 * 7
    for layer in linear.values():
        assert isinstance(layer, Linear4bit)
        assert layer.compute_dtype == dtype
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        state = layer.weight.quant_state
        assert state.quant_type == quantization
        assert state.nested == double
        assert state.blocksize == 64
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    tensors = [*model.parameters(), *model.buffers()]
    assert {tensor.device.type for tensor in tensors} == {"cpu"}  # none is left on meta


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "none"])
def test_it_computes_with_the_dequantised_weights(quantization: str, double: bool, ids: Tensor) -> None:
    model = tiny(quantization=quantization, double_quantization=double)
    reference = dense_copy(model)
    assert logits(reference, ids).std() > 0.1
    torch.testing.assert_close(logits(model, ids), logits(reference, ids), atol=1e-4, rtol=1e-4)


def test_quantisation_only_rounds() -> None:
    exact, rounded = tiny(quantization="none"), dense_copy(tiny())
    for name, weight in exact.named_parameters():
        error = (rounded.get_parameter(name) - weight).norm() / weight.norm()
        assert error < (0.12 if "_proj" in name else 1e-7), name
        if "_proj" in name:
            assert error > 0.01
            assert 0.015 < weight.std() < 0.025  # the configuration's initializer_range


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_have_the_published_number_of_parameters(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(shape_config(name))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    config = model.config
    width = config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    layer = 2 * config.hidden_size * width + 3 * config.hidden_size * config.intermediate_size
    norms = config.hidden_size * (2 * config.num_hidden_layers + 1)
    vocabulary = config.vocab_size * config.hidden_size * (1 if config.tie_word_embeddings else 2)
    assert config.num_hidden_layers * layer + norms + vocabulary == PARAMETERS[name]


def write_config(folder: Path, **sizes: object) -> str:
    folder.mkdir()
    config = {
        "model_type": "llama",
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    (folder / "config.json").write_text(json.dumps(config | sizes))
    return str(folder)


def test_tied_embeddings_stay_tied(tmp_path: Path, ids: Tensor) -> None:
    name = write_config(tmp_path / "tied", tie_word_embeddings=True)
    model = load_backbone(BackboneConfig(name, weights="random")).model
    assert model.lm_head.weight is model.get_input_embeddings().weight
    torch.testing.assert_close(logits(model, ids), logits(dense_copy(model), ids), atol=1e-4, rtol=1e-4)


def test_biases_are_zero_and_frozen(tmp_path: Path, ids: Tensor) -> None:
    name = write_config(tmp_path / "biased", attention_bias=True, mlp_bias=True)
    model = load_backbone(BackboneConfig(name, weights="random")).model
    biases = [p for n, p in model.named_parameters() if n.endswith("bias")]
    assert len(biases) == 7
    assert not any(bias.any() or bias.requires_grad for bias in biases)
    assert logits(model, ids).isfinite().all()


def live_bytes() -> int:
    """Bytes of all tensors that exist (shared storage counted once)."""
    tensors = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    real = [
        t for t in tensors if not t.is_meta and not isinstance(t, FakeTensor)
    ]  # a compiler leaves fake ones
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in real}
    return sum(storages.values())


def test_building_never_holds_the_model_in_full_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = write_config(tmp_path / "mid", hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    quantised, shapes, used = filling.quantised_linear, [], []
    gc.collect()
    before = live_bytes()

    def measured(layer: nn.Linear, weight: Tensor, *rest: object) -> nn.Module:
        shapes.append(weight.shape)
        if len(shapes) % 7 == 0:
            used.append(live_bytes() - before)  # the weight is there, its quantised form not yet
        return quantised(layer, weight, *rest)

    monkeypatch.setattr(filling, "quantised_linear", measured)
    load_backbone(BackboneConfig(name, weights="random"))
    full = 4 * sum(shape.numel() for shape in shapes)
    assert len(used) == 6
    assert used[-1] > full / 8  # all but the last layer, in 4 bits
    assert max(used) < full / 4


@pytest.mark.parametrize("name", ["gpt-5", "/nowhere/at/all", "~/nowhere"])
def test_an_unknown_shape_lists_the_known_ones(name: str) -> None:
    with pytest.raises(BackboneError, match=r"unknown shape .*; choose one of llama2-7b, .* config\.json"):
        load_backbone(BackboneConfig(name, weights="random"))
    with pytest.raises(BackboneError, match="unknown shape"):  # which is asked for first
        load_tokenizer(BackboneConfig(name, weights="random"))


def test_a_folder_below_home_is_a_shape(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path / "mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_backbone(BackboneConfig("~/mine", weights="random")).model.config.intermediate_size == 192


def test_a_vocabulary_too_small_for_the_tokenizer(tmp_path: Path) -> None:
    name = write_config(tmp_path / "small", vocab_size=259)
    with pytest.raises(BackboneError, match=r"vocab_size is 259, .* 260 tokens; set vocab_size"):
        load_backbone(BackboneConfig(name, weights="random"))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{", "not a valid JSON"), ('{"model_type": "wat"}', "wat"), ('{"model_type": "t5"}', "CausalLM")],
)
def test_a_damaged_or_foreign_config_is_one_line(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(BackboneConfig(str(tmp_path), weights="random"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"{tmp_path} cannot be loaded: ")


def test_attention_that_is_not_installed() -> None:
    with pytest.raises(BackboneError, match="tiny cannot be loaded: FlashAttention2"):
        tiny(attention="flash_attention_2")


def test_attention_implementations_agree(ids: Tensor) -> None:
    torch.testing.assert_close(
        logits(tiny(attention="eager"), ids), logits(tiny(), ids), atol=1e-4, rtol=1e-4
    )
