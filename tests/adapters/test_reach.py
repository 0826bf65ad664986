"""Which layers can be adapted to text, in tiny models of several kinds."""

import copy
from collections.abc import Callable

import peft
import pytest
import torch
import transformers
from shared.tiny import SHAPE
from torch import nn

from moka_pl.adapters import (
    BaseModel,
    FullFineTuning,
    MokaConfig,
    adapter_state,
    find_targets,
    inject_adapter,
    load_adapter,
    merge,
    moka_layers,
    save_adapter,
    unmerge,
)
from moka_pl.adapters.coverage import left_out
from moka_pl.errors import AdapterError
from moka_pl.lm.scoring import score_tokens

SIZES = SHAPE | {"head_dim": 8, "pad_token_id": 0}
IDS = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(3))


def multimodal() -> transformers.PretrainedConfig:
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.Gemma3Config(
        text_config=SIZES | {"query_pre_attn_scalar": 8, "sliding_window": 32},
        vision_config=vision | {"image_size": 28, "patch_size": 14},
    )


def read_directly() -> transformers.PretrainedConfig:
    """A model whose layers read the weight of one of their linear layers in training."""
    return transformers.Gemma3nTextConfig(
        **SIZES,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        num_kv_shared_layers=0,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0, 0.0],
        layer_types=["full_attention", "full_attention"],
    )


def routed() -> transformers.PretrainedConfig:
    return transformers.Llama4TextConfig(
        **SIZES, num_local_experts=2, intermediate_size_mlp=48, attention_chunk_size=32
    )


def experts() -> transformers.PretrainedConfig:
    return transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)


def mamba() -> transformers.PretrainedConfig:
    sizes = {
        "mamba_d_ssm": 32,
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 1,
        "mamba_d_state": 8,
    }
    return transformers.FalconH1Config(**SIZES, **sizes)


KINDS = {kind.__name__: kind for kind in (multimodal, read_directly, routed, experts, mamba)}


def build(kind: Callable[[], transformers.PretrainedConfig]) -> nn.Module:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(kind(), dtype=torch.float32).eval()


def loss(model: nn.Module) -> torch.Tensor:
    return score_tokens(model, IDS, IDS).nll.mean()


@pytest.mark.parametrize(
    "targets", [pytest.param(["q_proj", "v_proj"], marks=pytest.mark.slow, id="q and v"), "all-linear"]
)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_every_adapted_layer_is_trained_merged_and_loaded(kind, targets, tmp_path) -> None:
    model = build(kind)
    config = MokaConfig(components=2, target_modules=targets)
    names = inject_adapter(model, config)
    assert not any("vision" in name or name.endswith(("correction_coefs", ".router")) for name in names)
    for layer in moka_layers(model).values():
        nn.init.normal_(layer.moka_B.detach(), std=0.1)
    total = loss(model.train())
    total.backward()
    assert torch.isfinite(total)
    # DDP asks for all of them.
    assert [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    model.eval()
    with torch.no_grad():
        adapted = model(input_ids=IDS).logits
        merge(model)
        torch.testing.assert_close(model(input_ids=IDS).logits, adapted, atol=1e-4, rtol=1e-3)
        unmerge(model)
        loaded = build(kind)
        load_adapter(loaded, save_adapter(tmp_path / "adapter", model, config, BaseModel("tiny")))
        assert torch.equal(loaded(input_ids=IDS).logits, adapted)
        assert list(moka_layers(loaded)) == names


def test_checkpointed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = build(read_directly)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        torch.manual_seed(1)
        inject_adapter(model, MokaConfig(components=2, target_modules="all-linear"))
        loss(model.train()).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


VISION = "model.vision_tower.encoder.layers.0.self_attn.q_proj"
NAMED = {
    "regex": r".*vision_tower.*q_proj",
    "full name": [VISION],
    "the part's name": ["vision_tower.encoder.layers.0.self_attn.q_proj"],
}


@pytest.mark.parametrize("targets", NAMED.values(), ids=NAMED)
def test_a_vision_tower_is_adapted_where_it_is_named(targets) -> None:
    assert find_targets(build(multimodal), MokaConfig(target_modules=targets)) == [VISION]


def test_a_suffix_of_the_vision_tower_alone_is_refused() -> None:
    with pytest.raises(AdapterError, match=r"no text passes through \(in model\.vision_tower\)"):
        find_targets(build(multimodal), MokaConfig(target_modules=["fc1"]))


@pytest.mark.parametrize(
    ("kind", "target", "reason"),
    [
        (read_directly, ["correction_coefs"], "Gemma3nTextAltUp reads its weight without calling it"),
        (read_directly, r".*correction_coefs", "Gemma3nTextAltUp reads its weight without calling it"),
        (routed, ["router"], "a Llama4Router computes more than W x"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_refused_by_name(kind, target, reason: str) -> None:
    model = build(kind)
    with pytest.raises(AdapterError, match=reason):
        inject_adapter(model, MokaConfig(target_modules=target))
    assert not moka_layers(model)


def test_what_is_left_out_is_said_with_its_share() -> None:
    config = MokaConfig(components=2, target_modules="all-linear")
    said = {}
    for kind in (multimodal, read_directly, experts):
        model = build(kind)
        inject_adapter(model, config)
        said[kind] = left_out(model, config)
    assert said[experts] == ""
    model = build(experts)
    inject_adapter(model, MokaConfig(components=2, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]))
    said[experts] = left_out(model, config)
    assert "not adapted: model.vision_tower (" in said[multimodal]
    assert "not adapted: model.layers.*.altup.correction_coefs (" in said[read_directly]
    assert "adapted: 8 layers, 14.3% of the linear weights; not adapted: " in said[experts]
    assert said[experts].endswith("model.layers.*.mlp.experts in fused weights (85.7%)")


@pytest.mark.parametrize("targets", [["q_proj", "spare_proj"], "all-linear"], ids=["by suffix", "all-linear"])
def test_a_layer_without_use_is_left_out_and_said(targets, make_llama) -> None:
    model = make_llama()
    model.model.layers[0].self_attn.spare_proj = nn.Linear(32, 32)
    config = MokaConfig(components=2, target_modules=targets)
    assert not any("spare" in name for name in inject_adapter(model, config))
    assert "not adapted: model.layers.*.self_attn.spare_proj (" in left_out(model, config)
    assert find_targets(make_llama(), MokaConfig(target_modules=["q_proj"]))


def test_nothing_is_said_where_all_is_adapted(make_llama) -> None:
    for config in (MokaConfig(), MokaConfig(target_modules="all-linear")):
        model = make_llama()
        inject_adapter(model, config)
        assert left_out(model, config) == ""


def test_the_trial_changes_neither_modes_nor_random_numbers() -> None:
    model = build(multimodal)
    model.model.vision_tower.train()
    modes = {name: module.training for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    torch.manual_seed(5)
    state = torch.get_rng_state()
    find_targets(model, MokaConfig())
    assert torch.equal(torch.get_rng_state(), state)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())


def test_an_adapter_that_holds_a_vision_tower_goes_on_loading(tmp_path) -> None:
    model = build(multimodal)
    everywhere = r".*\.(q|v)_proj"
    inject_adapter(model, MokaConfig(components=2, target_modules=everywhere))
    state = adapter_state(model)
    assert any("vision" in name for name in state)
    # as it was saved before towers were left out
    path = save_adapter(
        tmp_path / "a", model, MokaConfig(components=2, target_modules=["q_proj", "v_proj"]), BaseModel("x")
    )
    loaded = build(multimodal)
    load_adapter(loaded, path)
    assert adapter_state(loaded).keys() == state.keys()


def test_other_methods_leave_the_vision_tower_out_too() -> None:
    model = build(multimodal)
    names = inject_adapter(model, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert len(names) == 4
    assert not any("vision" in name for name in names)
    model = build(multimodal)
    inject_adapter(model, FullFineTuning())
    loss(model.train()).backward()
    missing = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert missing == []


def test_a_whole_layer_missing_from_an_adapter_is_refused(tmp_path, make_llama) -> None:
    from safetensors.torch import load_file, save_file

    model = make_llama()
    inject_adapter(model, config := MokaConfig(components=2))
    path = save_adapter(tmp_path / "a", model, config, BaseModel("x"))
    file = path / "adapter_model.safetensors"
    kept = {name: t for name, t in load_file(file).items() if "layers.1.self_attn.q_proj" not in name}
    save_file(kept, file)
    plain = make_llama()
    with pytest.raises(AdapterError, match=r"holds \d+ numbers, but adapter_config.json says \d+"):
        load_adapter(plain, path)
    assert not moka_layers(plain)
