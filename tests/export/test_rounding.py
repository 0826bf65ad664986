"""An export in half precision is told from a wrong one: what rounding makes of the adapter is known."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, PreTrainedModel

from moka_pl.adapters import (
    BaseModel,
    FullFineTuning,
    MokaConfig,
    MokaLinear,
    inject_adapter,
    moka_layers,
    save_adapter,
)
from moka_pl.backbone import BackboneConfig, fingerprint, load_backbone
from moka_pl.backbone.linear_layers import quantise_rest
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import AdapterError
from moka_pl.export import merged
from moka_pl.export.check import largest_difference, measure
from moka_pl.export.merged import export_merged, merged_parts, write_description, write_weights
from moka_pl.export.rounding import round_weights, to_dtype
from moka_pl.export.source import Source, open_source
from moka_pl.studies.architectures.families import FAMILIES, tiny_model

PROMPTS = [torch.arange(4, 40), torch.arange(90, 60, -1)]
MIXTRAL = next(family for family in FAMILIES if family.name == "Mixtral")


def check_reference(model: PreTrainedModel, dtype: torch.dtype, out: Path) -> None:
    """What a model computes with rounded weights is what transformers makes of the export."""
    before = measure(model, PROMPTS)
    write_weights(out, merged_parts(model), dtype)
    write_description(out, model, byte_tokenizer(), dtype)
    found = measure(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(), PROMPTS)
    round_weights(model, to_dtype(dtype))
    reference = measure(model, PROMPTS)
    largest = max(float(logits.abs().max()) for logits in before.logits)
    assert largest_difference(reference, found) < 2e-5 * largest
    assert largest_difference(before, found) > 2e-4 * largest


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("quantization", ["nf4", "int8", "none"])
def test_of_quantised_and_plain_bases(
    quantization, dtype: torch.dtype, randomize: Callable, tmp_path: Path
) -> None:
    model = load_backbone(BackboneConfig("tiny", weights="random", quantization=quantization)).model
    inject_adapter(model, MokaConfig(components=2))
    randomize(model)
    check_reference(model, dtype, tmp_path)


@pytest.mark.parametrize(
    ("config", "tied"),
    [
        (FullFineTuning(), False),
        (FullFineTuning(), True),
        (MokaConfig(components=2, target_modules=["lm_head"]), True),
        (MokaConfig(components=2, target_modules=["embed_tokens", "v_proj"]), True),
        (MokaConfig(components=2, target_modules=["embed_tokens", "lm_head"]), True),
        (MokaConfig(components=2, target_modules=["embed_tokens"], ensure_weight_tying=True), True),
        (MokaConfig(components=2, trainable_token_indices=[3, 7]), True),
        (MokaConfig(components=2, modules_to_save=["up_proj"]), False),
    ],
    ids=str,
)
def test_of_whatever_was_trained(
    config, tied: bool, make_llama: Callable, randomize: Callable, tmp_path: Path
) -> None:
    model = make_llama(tie_word_embeddings=tied, attention_bias=True)
    inject_adapter(model, config)
    if moka_layers(model):
        randomize(model)
    check_reference(model, torch.bfloat16, tmp_path)


@pytest.mark.filterwarnings("ignore:Model .*tie_word_embeddings")
@pytest.mark.parametrize(
    ("options", "tied"),
    [
        ({}, False),
        ({"target_modules": ["embed_tokens", "q_proj"]}, True),
        ({"trainable_token_indices": [3]}, True),
        ({"modules_to_save": ["lm_head", "norm"]}, False),
    ],
    ids=str,
)
def test_of_peft_s_adapters(options: dict, tied: bool, make_llama: Callable, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = make_llama(tie_word_embeddings=tied)
    inject_adapter(
        model, peft.LoraConfig(r=2, **{"target_modules": ["q_proj"], "init_lora_weights": False} | options)
    )
    check_reference(model, torch.bfloat16, tmp_path)


@pytest.mark.parametrize("quantised", [True, False])
def test_of_experts(quantised: bool, randomize: Callable, tmp_path: Path) -> None:
    model = tiny_model(MIXTRAL)
    if quantised:
        quantise_rest(model, "nf4", True, torch.float32)
    inject_adapter(model, MokaConfig(components=2, target_modules="all-linear"))
    randomize(model, std=0.1)
    check_reference(model, torch.bfloat16, tmp_path)


def test_of_conv1d(randomize: Callable, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4)).eval()
    inject_adapter(model, MokaConfig(components=2))
    randomize(model)
    check_reference(model, torch.bfloat16, tmp_path)


# What the check makes of mistakes, in a shallow model and in a deep one whose rounding costs much.


@pytest.fixture(scope="module")
def adapters() -> dict[int, Path]:
    """The adapters that ``source`` has made, by their numbers of layers; nothing writes to them."""
    return {}


@pytest.fixture(params=[2, 32], ids=["shallow", "deep"])
def source(
    request: pytest.FixtureRequest,
    adapters: dict[int, Path],
    tmp_path_factory: pytest.TempPathFactory,
    randomize: Callable,
    one_thread: None,
) -> Source:
    """A small adapter of a random model of layers with the gain of LLaMA2-7B's random ones."""
    if request.param not in adapters:
        folder = tmp_path_factory.mktemp("source")
        sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 2}
        shape = LlamaConfig(vocab_size=320, num_hidden_layers=request.param, initializer_range=0.16, **sizes)
        shape.save_pretrained(folder / "shape")
        base = BackboneConfig(str(folder / "shape"), weights="random")
        model, config = load_backbone(base).model, MokaConfig(components=3, filters="square")
        inject_adapter(model, config)
        randomize(model, std=0.05)
        remembered = BaseModel(base.name, None, fingerprint(model), base.options())
        save_adapter(folder / "adapter", model, config, remembered, {"prompt": "alpaca"})
        adapters[request.param] = folder / "adapter"
    return open_source(adapters[request.param])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_what_was_trained_passes(
    dtype: torch.dtype, source: Source, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_merged(source, tmp_path / "out", dtype)
    assert f"; beyond rounding to {str(dtype).removeprefix('torch.')} " in capsys.readouterr().out


@pytest.mark.parametrize("mistake", ["scaling", "forgotten", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_wrong_update_is_refused(
    mistake: str, dtype: torch.dtype, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, one = MokaLinear.get_delta_weight, next(reversed(moka_layers(source.model).values()))

    def wrong(layer: MokaLinear) -> torch.Tensor:
        if mistake == "scaling":
            return 1.05 * right(layer)
        if layer is not one:
            return right(layer)
        pairs = zip(layer.gates() * layer.scaling, layer.factors(), strict=True)
        update = sum(weight * torch.kron(left.T.contiguous(), factor) for weight, (left, factor) in pairs)
        return 0 * update if mistake == "forgotten" else update

    monkeypatch.setattr(MokaLinear, "get_delta_weight", wrong)
    with pytest.raises(AdapterError, match="the export is not what was trained, and nothing was written"):
        export_merged(source, tmp_path / "out", dtype)
    assert not (tmp_path / "out").exists()


def test_a_file_of_other_numbers_is_refused(source: Source, tmp_path: Path, monkeypatch) -> None:
    right = merged.converted

    def wrong(part: merged.Part, dtype: torch.dtype) -> torch.Tensor:
        tensor = right(part, dtype)
        return tensor * 1.01 if part.name == "model.layers.1.mlp.up_proj.weight" else tensor

    monkeypatch.setattr(merged, "converted", wrong)
    with pytest.raises(AdapterError, match="Report it"):
        export_merged(source, tmp_path / "out", torch.bfloat16)
