"""What transformers reads of an unloaded model that it saved: the same model, or nothing was written."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

import moka_pl
from moka_pl.adapters import (
    BaseModel,
    MokaConfig,
    inject_adapter,
    load_adapter,
    merge,
    moka_layers,
    save_adapter,
    unload,
)
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.quantization import is_quantised, keep_weights
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import AdapterError

#: Rows of 64 entries and more, which bitsandbytes reads right on every CPU.
SIZES: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHAPES: dict[str, T.PretrainedConfig] = {
    "llama": T.LlamaConfig(**SIZES),
    "tied": T.LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": T.GPT2Config(
        vocab_size=320, n_embd=64, n_layer=2, n_head=4, initializer_range=0.2, bos_token_id=1, eos_token_id=2
    ),
    "mixtral": T.MixtralConfig(**SIZES, num_local_experts=4, num_key_value_heads=4),
    "falcon": T.FalconConfig(**SIZES),
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32}
SKIPPING = NF4 | {"llm_int8_skip_modules": ["lm_head", "down_proj"]}
WITH_HEAD = NF4 | {"llm_int8_skip_modules": []}
ALL = MokaConfig(components=2, target_modules="all-linear")
SOME = MokaConfig(components=2)
IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(4))
REFUSED = r"cannot be saved: transformers would not read \S+ back as it is stored, in {}; .*--to merged"


def logits(model: nn.Module) -> Tensor:
    keep_weights(model)  # bitsandbytes would round scales when it is first evaluated
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def reread(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")


@pytest.fixture
def base(tmp_path: Path) -> Callable[..., PreTrainedModel]:
    """Loads a tiny model by this package, or with ``BitsAndBytesConfig`` or its options by transformers."""

    def load(shape: str = "llama", by: Any = None, **options: Any) -> PreTrainedModel:
        if not (folder := tmp_path / shape).exists():
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(SHAPES[shape], dtype=torch.float32).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
        if by is None:
            return load_backbone(BackboneConfig(str(folder), **options)).model
        config = by if isinstance(by, BitsAndBytesConfig) else BitsAndBytesConfig(**by)
        return AutoModelForCausalLM.from_pretrained(  # type: ignore[no-any-return]
            folder, quantization_config=config, device_map="cpu", dtype=torch.float32
        )

    return load


def check_round_trip(model: PreTrainedModel, folder: Path) -> None:
    """Twice, as the second time nothing of the package is left in the way."""
    for again in ("once", "twice"):
        model.save_pretrained(folder / again)
        assert torch.equal(logits(reread(folder / again)), logits(model))


BASES: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"shape": "tied"},
    "gpt2": {"shape": "gpt2"},
    "transformers": {"by": NF4},
    "skipping": {"by": SKIPPING},
    "with head": {"by": WITH_HEAD},
    "gpt2 of transformers": {"shape": "gpt2", "by": NF4},
    "mixtral of transformers": {"shape": "mixtral", "by": NF4},
    "random": {"weights": "random"},
}


@pytest.mark.parametrize("put", [moka_pl.attach, inject_adapter])
@pytest.mark.parametrize("name", BASES)
def test_layers_that_stay_in_4_bits_and_merged_ones_are_read_back(
    name: str, put: Callable, base: Callable, randomize: Callable, tmp_path: Path
) -> None:
    model = base(**BASES[name])
    put(model, SOME)
    randomize(model)
    adapted = logits(model)
    unload(model, merge=True)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)
    check_round_trip(model, tmp_path / "out")
    assert any(is_quantised(layer) for layer in model.modules())


@pytest.mark.parametrize("name", ["llama", "transformers", "mixtral of transformers"])
def test_nothing_is_said_of_4_bits_where_all_layers_are_merged(
    name: str, base: Callable, randomize: Callable, tmp_path: Path
) -> None:
    model = base(**BASES[name])
    moka_pl.attach(model, ALL)
    randomize(model)
    unload(model, merge=True)
    assert not hasattr(model.config, "quantization_config")
    assert not getattr(model, "hf_quantizer", None)
    assert not model.is_quantized
    assert not hasattr(model, "is_loaded_in_4bit")
    model.double()  # which transformers forbids for quantised models
    model.float()
    check_round_trip(model, tmp_path / "out")


def test_a_base_is_described_as_it_was_and_a_user_s_own_options_stay(base: Callable, tmp_path: Path) -> None:
    options = BitsAndBytesConfig(**SKIPPING)
    model = base(by=options)
    moka_pl.attach(model, SOME)
    unload(model)
    check_round_trip(model, tmp_path / "base")
    assert model.config.quantization_config.llm_int8_skip_modules == ["lm_head", "down_proj"]
    moka_pl.attach(model, SOME)
    unload(model, merge=True)
    assert "model.layers.1.self_attn.q_proj" in model.config.quantization_config.llm_int8_skip_modules
    assert model.hf_quantizer.quantization_config is model.config.quantization_config
    assert options.llm_int8_skip_modules == ["lm_head", "down_proj"]


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize("quantization", ["nf4", "fp4", "int8"])
def test_the_base_of_an_adapter_on_random_weights(
    quantization: str, merged: bool, base: Callable, randomize: Callable, tmp_path: Path
) -> None:
    model = base(weights="random", quantization=quantization, double_quantization=False)
    inject_adapter(model, SOME)
    randomize(model)
    config = BackboneConfig(
        str(tmp_path / "llama"), weights="random", quantization=quantization, double_quantization=False
    )
    of = BaseModel(config.name, None, fingerprint(model), config.options())
    loaded, _ = moka_pl.load_model(save_adapter(tmp_path / "adapter", model, SOME, of), device="cpu")
    assert torch.equal(logits(loaded), logits(model))
    unload(loaded, merge=merged)
    if quantization != "int8":
        check_round_trip(loaded, tmp_path / "out")
        read = reread(tmp_path / "out" / "once").config.quantization_config
        assert (read.bnb_4bit_quant_type, read.bnb_4bit_use_double_quant) == (quantization, False)
        return
    with pytest.raises(AdapterError, match=REFUSED.format("int8")):
        loaded.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("merged", [True, False])
@pytest.mark.parametrize(
    ("shape", "quantization", "stored"),
    [("llama", "int8", "int8"), ("mixtral", "nf4", "4 bits"), ("falcon", "nf4", "4 bits")],
)
def test_what_would_be_misread_is_refused_before_anything_is_written(
    shape: str, quantization: str, stored: str, merged: bool, base: Callable, tmp_path: Path
) -> None:
    """transformers has no layer for the package's int8, and none in 4 bits for experts and Falcon's own."""
    model = base(shape, quantization=quantization)
    put = moka_pl.attach if merged else inject_adapter
    put(model, SOME)
    unload(model, merge=merged)
    for copied in (model, copy.deepcopy(model)):
        for _ in range(2):
            with pytest.raises(AdapterError, match=REFUSED.format(stored)) as raised:
                copied.save_pretrained(tmp_path / "out")
            assert "\n" not in str(raised.value)
        with pytest.raises(AdapterError, match=REFUSED.format(stored)):
            copied.push_to_hub("owner/name")
    assert not (tmp_path / "out").exists()
    inject_adapter(model, ALL)
    unload(model, merge=True)
    check_round_trip(model, tmp_path / "dense")


def test_8_bits_of_transformers_are_read_back_and_a_merge_names_the_export(
    base: Callable, tmp_path: Path
) -> None:
    model = base(by={"load_in_8bit": True})
    moka_pl.attach(model, SOME)
    with pytest.raises(AdapterError, match=r"cannot merge into a Linear8bitLt .* export ADAPTER --to merged"):
        unload(model, merge=True)
    unload(model)
    check_round_trip(model, tmp_path / "out")


@pytest.mark.parametrize("merging", [merge, partial(unload, merge=True)])
def test_a_merge_that_is_refused_leaves_all_adapters(base: Callable, merging: Callable) -> None:
    model = base(by={"load_in_8bit": True})
    moka_pl.attach(model, MokaConfig(components=2, target_modules=["embed_tokens", "q_proj"]))
    before, tied = moka_layers(model), model.config.tie_word_embeddings
    assert "model.embed_tokens" in before
    with pytest.raises(AdapterError, match="cannot merge into a Linear8bitLt"):
        merging(model)
    assert moka_layers(model) == before
    assert model.config.tie_word_embeddings == tied
    assert all(layer.merged_layer is None for layer in before.values())


def test_a_model_that_gets_its_adapter_again_saves_that(
    base: Callable, randomize: Callable, tmp_path: Path
) -> None:
    model = base(quantization="int8")
    moka_pl.attach(model, SOME)
    randomize(model)
    expected = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    unload(model)
    load_adapter(model, tmp_path / "adapter", fingerprint(model))
    model.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(moka_pl.load_model(tmp_path / "again", device="cpu")[0]), expected)
