"""Finding target layers, wrapping them, merging and taking the adapters out again."""

import contextlib
import copy

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.pytorch_utils import Conv1D

from moka_pl.adapters import (
    MokaConfig,
    MokaLinear,
    adapters_disabled,
    find_targets,
    inject_adapter,
    merge,
    moka_layers,
    unload,
    unmerge,
)
from moka_pl.errors import AdapterError, ConfigError, MokaWarning

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
QV = [f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("q_proj", "v_proj")]
ALL = [
    f"model.layers.{i}.{part}.{name}"
    for i in range(2)
    for part, names in (("self_attn", ATTENTION), ("mlp", MLP))
    for name in names
]


def config(**options: object) -> MokaConfig:
    return MokaConfig(**({"components": 3, "scaling": 1.7} | options))


def test_a_layer_too_small_for_its_rank_is_named_and_the_model_stays_plain(tiny_llama: nn.Module) -> None:
    options = config(filters="servable", rank=8, target_modules="all-linear")  # k and v have 16 outputs
    with pytest.raises(ConfigError, match=r"layers\.0\.self_attn\.k_proj: a layer of 16 × 32 has at most"):
        inject_adapter(tiny_llama, options)
    assert not moka_layers(tiny_llama)
    inject_adapter(tiny_llama, config(filters="servable", rank=5, target_modules=["lm_head", "v_proj"]))
    assert {layer.exact_lora_rank() for layer in moka_layers(tiny_llama).values()} == {15}


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


PATTERNS = {
    "suffixes": ({"target_modules": ["q_proj", "v_proj"]}, QV),
    "one layer": ({"target_modules": ["model.layers.1.mlp.up_proj"]}, ["model.layers.1.mlp.up_proj"]),
    "dotted suffix": ({"target_modules": ["self_attn.q_proj"]}, QV[::2]),
    "suffix of whole parts only": ({"target_modules": ["q_proj", "proj", "_proj"]}, QV[::2]),
    "suffix is no regex": ({"target_modules": ["q_proj", ".*"]}, QV[::2]),
    "head by name": ({"target_modules": ["lm_head"]}, ["lm_head"]),
    "embedding by name": (
        {"target_modules": ["embed_tokens", "o_proj"]},
        ["model.embed_tokens", "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.o_proj"],
    ),
    "regex": ({"target_modules": r".*\.(q|v)_proj"}, QV),
    "regex of one layer": ({"target_modules": r"model\.layers\.0\..*proj"}, ALL[:7]),
    "all-linear": ({"target_modules": "all-linear"}, ALL),
    "excluded suffix": ({"target_modules": ATTENTION, "exclude_modules": ["k_proj", "o_proj"]}, QV),
    "excluded regex": ({"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.0\..*"}, QV[2:]),
    "excluded regex is for whole names": (
        {"target_modules": ["q_proj", "v_proj"], "exclude_modules": "v_proj"},
        QV,
    ),
    "all-linear but": (
        {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "down_proj", "gate_proj"]},
        [name for name in ALL if "mlp" not in name],
    ),
}


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")
@pytest.mark.parametrize(("options", "expected"), PATTERNS.values(), ids=PATTERNS)
def test_patterns_adapt_the_layers_that_peft_adapts(options: dict, expected: list[str], tiny_llama) -> None:
    reference = peft.get_peft_model(copy.deepcopy(tiny_llama), peft.LoraConfig(**options)).get_base_model()
    theirs = [name for name, module in reference.named_modules() if isinstance(module, LoraLayer)]
    assert find_targets(tiny_llama, config(**options)) == expected
    assert inject_adapter(tiny_llama, config(**options)) == expected
    assert list(moka_layers(tiny_llama)) == expected
    assert sorted(theirs) == sorted(expected)


def test_all_linear_leaves_a_tied_head_alone(make_llama) -> None:
    model = make_llama(tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert inject_adapter(model, config(target_modules="all-linear")) == ALL
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_all_linear_of_a_model_without_a_head(tiny_llama) -> None:
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    assert inject_adapter(plain, config(target_modules="all-linear")) == ["0", "2"]
    body = [name.removeprefix("model.") for name in ALL]
    assert inject_adapter(tiny_llama.model, config(target_modules="all-linear")) == body


@pytest.mark.parametrize(
    ("targets", "near"),
    [
        (["q_porj", "vproj"], ["q_proj", "v_proj"]),
        (["downproj"], ["down_proj"]),
        ("q_proj", ["q_proj"]),  # as a regex it names no whole name
        (["query_key_value"], ["q_proj", "lm_head"]),  # nothing is near: all there are
        (["proj"], ["q_proj"]),
        (["embed_token"], ["embed_tokens"]),
    ],
)
def test_when_nothing_matches_the_nearest_names_are_told(targets, near: list[str], tiny_llama) -> None:
    with pytest.raises(AdapterError, match="matches no layer") as caught:
        inject_adapter(tiny_llama, config(target_modules=targets))
    told = str(caught.value).partition("closest names: ")[2].split(", ")
    assert set(near) <= set(told)
    assert repr(targets) in str(caught.value)


def test_nothing_matches_in_a_model_without_linear_layers() -> None:
    with pytest.raises(AdapterError, match="has no linear layers"):
        inject_adapter(nn.Sequential(nn.ReLU()), config(target_modules="all-linear"))


def test_excluding_everything_is_told_apart_from_matching_nothing(tiny_llama) -> None:
    with pytest.raises(AdapterError, match=r"exclude_modules '\.\*' excludes every layer"):
        inject_adapter(tiny_llama, config(exclude_modules=".*"))


@pytest.mark.parametrize("targets", [["self_attn"], ["norm"], r"model\.layers\.0.*"])
def test_only_linear_layers_and_embeddings_can_be_adapted(targets, tiny_llama) -> None:
    with pytest.raises(AdapterError, match=r"target model\.\S+ is a Llama"):
        inject_adapter(tiny_llama, config(target_modules=targets))
    assert not moka_layers(tiny_llama)


@pytest.mark.parametrize("option", ["target_modules", "exclude_modules"])
def test_an_invalid_regex_is_told_before_there_is_a_model(option: str) -> None:
    with pytest.raises(AdapterError, match=r"'\(q_proj' is not a valid regular expression.*unterminated"):
        config(**{option: "(q_proj"})


def test_adapters_are_not_put_upon_adapters(tiny_llama) -> None:
    inject_adapter(tiny_llama, config())
    with pytest.raises(AdapterError, match="already has adapters") as caught:
        inject_adapter(tiny_llama, config(target_modules=["o_proj"]))
    assert QV[0] in str(caught.value)
    assert list(moka_layers(tiny_llama)) == QV


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        (nn.Linear(8, 8), "is a Linear itself.*torch.nn.Sequential"),
        (Conv1D(8, 8), "matches nothing|no linear"),
    ],
    ids=["Linear", "Conv1D"],
)
def test_a_layer_alone_is_no_model(layer: nn.Module, told: str) -> None:
    """Its adapter would hold itself, and whatever walks through its modules would not come to an end."""
    with pytest.raises(AdapterError, match=told):
        inject_adapter(layer, config(target_modules="all-linear"))
    assert len(list(layer.modules())) == 1
    inject_adapter(nn.Sequential(layer), config(target_modules=["0"]))


def test_a_filter_that_does_not_fit_names_the_layer_and_changes_nothing(tiny_llama) -> None:
    # q_proj is 32 × 32 and takes it; v_proj has 16 outputs (two heads of eight).
    with pytest.raises(
        ConfigError, match=r"^model\.layers\.0\.self_attn\.v_proj: .*\(16 outputs, 32 inputs\)"
    ):
        inject_adapter(tiny_llama, config(filters=[[32, 4]]))
    assert not moka_layers(tiny_llama)
    assert all(parameter.requires_grad for parameter in tiny_llama.parameters())


@pytest.mark.parametrize(("gating", "kinds"), [("softmax", {"A", "B", "gate"}), ("none", {"A", "B"})])
def test_only_factors_and_gates_are_trained(gating: str, kinds: set[str], tiny_llama) -> None:
    inject_adapter(tiny_llama, config(gating=gating))
    trained = {name for name, parameter in tiny_llama.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in tiny_llama.named_parameters() if ".moka_" in name}
    assert {name.split("moka_")[1].split(".")[0] for name in trained} == kinds
    assert {name.split(".moka_")[0] for name in trained} == set(QV)


@pytest.mark.parametrize("filters", ["diverse", "prime"])
def test_training_changes_the_outputs_and_no_frozen_tensor(filters: str, tiny_llama, token_ids) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_llama.state_dict().items()}
    frozen = logits(tiny_llama, token_ids)
    inject_adapter(tiny_llama, config(filters=filters, target_modules="all-linear"))
    assert torch.equal(logits(tiny_llama, token_ids), frozen)
    optimizer = torch.optim.AdamW((p for p in tiny_llama.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = tiny_llama(token_ids, labels=token_ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    for name, layer in moka_layers(tiny_llama).items():
        assert layer.get_delta_weight().any(), name
        assert layer.moka_gate.any(), name
    unload(tiny_llama)
    for name, tensor in tiny_llama.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_merge_keeps_the_outputs_and_unmerge_restores_them(tiny_llama, token_ids, randomize) -> None:
    inject_adapter(tiny_llama, config())
    randomize(tiny_llama)
    adapted = logits(tiny_llama, token_ids)
    merge(tiny_llama)
    assert all(layer.merged_layer for layer in moka_layers(tiny_llama).values())
    torch.testing.assert_close(logits(tiny_llama, token_ids), adapted, rtol=1e-3, atol=1e-4)
    unmerge(tiny_llama)
    assert not any(layer.merged_layer for layer in moka_layers(tiny_llama).values())
    assert torch.equal(logits(tiny_llama, token_ids), adapted)


@pytest.mark.parametrize("merged_before", [False, True])
@pytest.mark.parametrize("merging", [False, True])
def test_unload_leaves_plain_layers(
    merging: bool, merged_before: bool, tiny_llama, token_ids, randomize
) -> None:
    names = list(tiny_llama.state_dict())
    frozen = logits(tiny_llama, token_ids)
    inject_adapter(tiny_llama, config())
    randomize(tiny_llama)
    adapted = logits(tiny_llama, token_ids)
    assert (adapted - frozen).abs().max() > 0.1
    if merged_before:
        merge(tiny_llama)
    unload(tiny_llama, merge=merging)
    assert not moka_layers(tiny_llama)
    assert list(tiny_llama.state_dict()) == names
    assert type(tiny_llama.get_submodule(QV[0])) is nn.Linear
    left = logits(tiny_llama, token_ids)
    if merging:
        torch.testing.assert_close(left, adapted, rtol=1e-3, atol=1e-4)
    else:
        assert torch.equal(left, frozen)
    inject_adapter(tiny_llama, config())  # and adapters can be put in anew


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters_leave_the_frozen_model_and_come_back(
    merged: bool, tiny_llama, token_ids, randomize
) -> None:
    frozen = logits(tiny_llama, token_ids)
    inject_adapter(tiny_llama, config())
    randomize(tiny_llama)
    if merged:
        merge(tiny_llama)
    adapted = logits(tiny_llama, token_ids)
    moka_layers(tiny_llama)[QV[1]].enabled = False
    partly = logits(tiny_llama, token_ids)
    assert not torch.equal(partly, adapted)
    with contextlib.suppress(RuntimeError), adapters_disabled(tiny_llama):
        assert torch.equal(logits(tiny_llama, token_ids), frozen)
        raise RuntimeError("an error in the block, too, brings them back")
    assert torch.equal(logits(tiny_llama, token_ids), partly)  # each layer is as it was before


@pytest.mark.parametrize("training", [True, False])
def test_injection_keeps_training_or_evaluation(training: bool, tiny_llama) -> None:
    tiny_llama.train(training)
    inject_adapter(tiny_llama, config(dropout=0.5))
    assert all(module.training is training for module in tiny_llama.modules())


def test_dtype_of_the_trainable_tensors_can_be_chosen(tiny_llama) -> None:
    inject_adapter(tiny_llama.bfloat16(), config(), dtype=torch.float32)
    for layer in moka_layers(tiny_llama).values():
        assert isinstance(layer, MokaLinear)
        assert {p.dtype for p in layer.parameters() if p.requires_grad} == {torch.float32}
        assert layer.base_layer.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["moka", "peft"])
def test_names_in_a_list_that_mean_nothing_are_told(tiny_llama, kind) -> None:
    options = {"target_modules": ["q_proj", "v_porj"], "exclude_modules": ["0.self_attn.q_proj", "tower"]}
    config = MokaConfig(components=2, **options) if kind == "moka" else peft.LoraConfig(**options)
    with pytest.warns(MokaWarning) as told:
        inject_adapter(tiny_llama, config)
    assert [str(warning.message) for warning in told] == [
        "target_modules: this model has no v_porj (did you mean v_proj?); correct the name, or leave it out",
        "exclude_modules: this model has no tower; correct the name, or leave it out",
    ]


@pytest.mark.filterwarnings("error")
def test_names_that_are_there_are_not_told(make_llama) -> None:
    for targets in (
        ["q_proj", "v_proj"],
        ["layers.0.mlp.up_proj", "lm_head"],
        "all-linear",
        "nothing|.*q_proj",
    ):
        inject_adapter(
            make_llama(), MokaConfig(components=2, target_modules=targets, exclude_modules=["mlp.gate_proj"])
        )
