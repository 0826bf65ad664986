"""Other methods than MoKA, against PEFT's own models of the same seed."""

import copy

import peft
import pytest
import torch
from torch import nn

from moka_pl.adapters import (
    BaseModel,
    FullFineTuning,
    KronA,
    MokaS,
    MokaServable,
    MokaUngated,
    adapted_layers,
    adapters_disabled,
    inject_adapter,
    load_adapter,
    merge,
    method_of,
    read_adapter,
    save_adapter,
    unload,
    unmerge,
)
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.backbone.quantization import dense_weight, is_quantised
from moka_pl.errors import AdapterError, ConfigError

QV = ["q_proj", "v_proj"]
LORA = {"r": 2, "lora_alpha": 7, "target_modules": QV}
METHODS = {
    "lora": lambda: peft.LoraConfig(**LORA),
    "rslora": lambda: peft.LoraConfig(**LORA, use_rslora=True),
    "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
    "loha": lambda: peft.LoHaConfig(r=2, alpha=7, target_modules=QV),
    "lokr": lambda: peft.LoKrConfig(r=2, alpha=7, target_modules=QV),
}
IDS = torch.randint(4, 90, (2, 7), generator=torch.Generator().manual_seed(3))
BASE = BaseModel("tiny")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits.float()


def randomise(model):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)


def base(quantization):
    return load_backbone(
        BackboneConfig("tiny", weights="random", quantization=quantization, seed=3)
    ).model.eval()


def both(make, quantization):
    """Our model and PEFT's, of the same seed and the same random tensors."""
    ours, theirs = base(quantization), base(quantization)
    torch.manual_seed(5)
    inject_adapter(ours, make())
    torch.manual_seed(5)
    if quantization == "nf4":
        theirs.is_loaded_in_4bit = True
    wrapped = peft.get_peft_model(theirs, make()).eval()
    for own, other in zip(
        [p for p in ours.parameters() if p.requires_grad],
        [p for p in wrapped.parameters() if p.requires_grad],
        strict=True,
    ):
        assert torch.equal(own, other)  # the same start
        assert own.dtype == torch.float32
    randomise(ours)
    randomise(wrapped)
    return ours.eval(), wrapped


CASES = [(name, "none") for name in METHODS] + [(name, "nf4") for name in ("lora", "rslora", "dora")]


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_computes_saves_loads_and_merges_as_peft(name, quantization, tmp_path):
    plain = logits(base(quantization))
    ours, wrapped = both(METHODS[name], quantization)
    expected = logits(ours)
    torch.testing.assert_close(expected, logits(wrapped))
    assert (expected - plain).abs().max() > 0.01
    with adapters_disabled(ours):
        assert torch.equal(logits(ours), plain)

    path = save_adapter(tmp_path / "adapter", ours, METHODS[name](), BASE)
    loaded = base(quantization)
    info = load_adapter(loaded, path)
    assert method_of(info.config).options() == method_of(METHODS[name]()).options()
    assert torch.equal(logits(loaded), expected)
    if quantization == "none":  # the folder is one of PEFT's, too
        torch.testing.assert_close(logits(peft.PeftModel.from_pretrained(base("none"), path)), expected)

    merge(ours)
    torch.testing.assert_close(logits(ours), expected, atol=1e-3, rtol=1e-3)
    with adapters_disabled(ours):
        assert torch.equal(logits(ours), plain)
    unmerge(ours)
    assert torch.equal(logits(ours), expected)
    unload(ours)
    assert torch.equal(logits(ours), plain)
    unload(loaded, merge=True)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-3, rtol=1e-3)
    assert not any("lora" in n or "lokr" in n for n, _ in loaded.named_modules())


def test_layers_of_other_quantisers_are_their_dequantised_weights():
    ours, plain = base("int8"), base("int8")
    for name, layer in list(plain.named_modules()):
        if is_quantised(layer):
            dense = nn.Linear(layer.in_features, layer.out_features, bias=False)
            dense.weight = nn.Parameter(dense_weight(layer), requires_grad=False)
            plain.set_submodule(name, dense)
    for model in (ours, plain):
        torch.manual_seed(5)
        inject_adapter(model, METHODS["lora"]())
        randomise(model)
    torch.testing.assert_close(logits(ours), logits(plain))
    expected = logits(ours)
    merge(ours)
    torch.testing.assert_close(logits(ours), expected, atol=1e-3, rtol=1e-3)


def test_methods_that_read_such_weights_are_refused():
    model = base("int8")
    with pytest.raises(AdapterError, match=r"cannot inject DoRA .* not support quantised layers: set quant"):
        inject_adapter(model, METHODS["dora"]())
    assert not adapted_layers(model)


def test_4bit_layers_are_pefts_own():
    model = base("nf4")
    inject_adapter(model, METHODS["lora"]())
    assert type(model.model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"


@pytest.mark.parametrize(
    "make",
    [
        lambda: peft.IA3Config(target_modules="all-linear", feedforward_modules=["down_proj"]),
        lambda: peft.RoadConfig(target_modules="all-linear", group_size=8),
    ],
    ids=["ia3", "road"],
)
def test_layers_return_the_dtype_that_they_are_given(make):
    config = BackboneConfig("tiny", weights="random", quantization="nf4", compute_dtype="bfloat16")
    model = load_backbone(config).model
    assert inject_adapter(model, make())
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["lokr", "loha"])
def test_what_fails_on_4bit_layers_is_refused_and_the_model_stays_plain(name):
    model = base("nf4")
    expected, names = logits(model), [n for n, _ in model.named_modules()]
    with pytest.raises(AdapterError, match=r"PEFT cannot inject Lo(Kr|Ha) .* set quantization: none"):
        inject_adapter(model, METHODS[name]())
    assert [n for n, _ in model.named_modules()] == names
    assert torch.equal(logits(model), expected)
    inject_adapter(model, METHODS["lora"]())


def test_full_fine_tuning(tmp_path):
    model = base("none")
    plain = logits(model)
    inject_adapter(model, FullFineTuning())
    assert all(p.requires_grad for p in model.parameters())
    randomise(model)
    expected = logits(model)
    assert (expected - plain).abs().max() > 0.01
    path = save_adapter(tmp_path / "full", model, FullFineTuning(), BASE)
    loaded = base("none")
    assert load_adapter(loaded, path).config == FullFineTuning()
    assert torch.equal(logits(loaded), expected)
    with pytest.raises(AdapterError, match="changed the base's own weights"), adapters_disabled(model):
        pass
    with pytest.raises(AdapterError, match="cannot train quantised weights"):
        inject_adapter(base("nf4"), FullFineTuning())


def test_presets(tmp_path):
    assert MokaUngated().gating == "none"
    assert MokaS().filters == "prime"
    servable = MokaServable()
    assert (servable.components, servable.filters, servable.rank) == (1, "servable", 16)
    assert servable.target_modules == "all-linear"
    krona = KronA()
    assert (krona.components, krona.filters, krona.gating, krona.effective_scaling) == (
        1,
        "square",
        "none",
        1.0,
    )
    model = base("none")
    inject_adapter(model, krona)
    path = save_adapter(tmp_path / "krona", model, krona, BASE)
    assert read_adapter(path).config.to_dict() == copy.copy(krona).to_dict()


def test_what_is_no_configuration_is_refused():
    with pytest.raises(ConfigError, match="adapter is a dict"):
        method_of({"r": 8})
    with pytest.raises(ConfigError, match="'pissa' depends"):
        method_of(peft.LoraConfig(**LORA, init_lora_weights="pissa"))


@pytest.mark.parametrize("rank", [8, 5])
def test_the_rank_is_told_whether_it_is_the_default_or_not(rank):
    facts = method_of(peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["q_proj"])).facts()
    assert facts == {"method": "LoRA", "r": rank, "lora_alpha": 3, "target modules": "q_proj"}
