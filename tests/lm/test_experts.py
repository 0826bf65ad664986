"""Fused experts as linear layers: quantised, adapted, merged, saved and put together again."""

from pathlib import Path

import pytest
import torch
from torch import nn

from moka_pl.adapters import MokaConfig, inject_adapter, merge, moka_layers, save_adapter, unload, unmerge
from moka_pl.adapters.coverage import left_out
from moka_pl.adapters.directory import load_adapter
from moka_pl.adapters.reading import BaseModel
from moka_pl.backbone import fingerprint, weight_samples
from moka_pl.backbone.fingerprint import compare_samples
from moka_pl.backbone.linear_layers import describe_storage, quantise_rest
from moka_pl.backbone.quantization import dense_weight, is_quantised
from moka_pl.errors import ConfigError
from moka_pl.export.merged import merged_parts
from moka_pl.export.source import check_no_experts
from moka_pl.lm.cuda_graphs import capture_unsupported_reason
from moka_pl.lm.experts import SplitExperts, fuse_experts, fused_experts, split_experts, split_names
from moka_pl.lm.scoring import score_tokens
from moka_pl.studies.architectures.families import FAMILIES, Family, tiny_model

IDS = torch.randint(4, 260, (2, 9), generator=torch.Generator().manual_seed(3))
GPT_OSS = Family("GPT-OSS", "gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2})
KINDS = {family.name: family for family in (*FAMILIES, GPT_OSS)}
#: Plain, multiplied from the left without routes, biased with interleaved gates, beside shared ones.
NAMES = ["Mixtral", "LLaMA 4", "GPT-OSS", "Qwen2 MoE"]
ALL = MokaConfig(components=2, target_modules="all-linear")


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", NAMES)
def test_split_experts_compute_the_same_and_are_put_together_bit_for_bit(name: str) -> None:
    model = tiny_model(KINDS[name])
    before, weights = logits(model), {key: p.clone() for key, p in model.named_parameters()}
    blocks, layers = [block for block, _ in fused_experts(model)], split_names(model)
    samples = weight_samples(model)
    split_experts(model)
    assert blocks
    assert [key for key, m in model.named_modules() if isinstance(m, SplitExperts)] == blocks
    assert [key for key in layers if type(model.get_submodule(key)) is nn.Linear] == layers
    torch.testing.assert_close(logits(model), before)
    assert compare_samples(samples, weight_samples(model)) == (0, samples_of(model))
    fuse_experts(model)
    assert {key: p.shape for key, p in model.named_parameters()} == {k: w.shape for k, w in weights.items()}
    assert all(torch.equal(p, weights[key]) for key, p in model.named_parameters())


def samples_of(model: nn.Module) -> int:
    """Matrices of a model with split experts, of which each block's first one is sampled."""
    parts = [key.split(".experts.") for key, p in model.named_parameters() if p.ndim > 1]
    return sum(len(part) == 1 or part[1].startswith("0.") for part in parts)


@pytest.mark.parametrize("name", NAMES[:3])
def test_an_adapter_of_experts_is_trained_merged_saved_and_taken_out(name, randomize, tmp_path: Path) -> None:
    model = tiny_model(KINDS[name])
    names = inject_adapter(model, ALL)
    plain = logits(model)
    assert any(key.endswith(".experts.3.down_proj") for key in names)
    assert left_out(model, ALL) == "" or "router" in left_out(model, ALL)
    randomize(model, std=0.1)
    score_tokens(model, IDS[:1, :2], IDS[:1, :2]).nll.sum().backward()  # fewer tokens than experts
    assert [key for key, p in model.named_parameters() if p.requires_grad and p.grad is None] == []
    adapted = logits(model)
    assert (adapted - plain).abs().max() > 0.1
    merge(model)
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)
    unmerge(model)
    parts = {part.name: part for part in merged_parts(model)}
    saved = save_adapter(tmp_path / "adapter", model, ALL, BaseModel(name, None, fingerprint(model)))
    unload(model)
    assert list(fused_experts(model))
    torch.testing.assert_close(logits(model), plain)
    load_adapter(model, saved, fingerprint(model))
    torch.testing.assert_close(logits(model), adapted, rtol=1e-3, atol=1e-3)
    unload(model, merge=True)
    own = dict(model.named_parameters())
    assert {key: p.shape for key, p in own.items()} == {key: own[key].shape for key in parts}
    for key, part in parts.items():
        assert part.shape == own[key].shape
        torch.testing.assert_close(part.make(), own[key].detach())


def test_experts_are_quantised_one_by_one() -> None:
    model = tiny_model(KINDS["Mixtral"])
    dense = {key: m for key, m in model.named_modules() if key.endswith(".experts")}
    first = dense["model.layers.0.mlp.experts"].gate_up_proj[2].clone()
    quantise_rest(model, "nf4", True, torch.float32)
    layer = model.get_submodule("model.layers.0.mlp.experts.2.gate_up_proj")
    assert is_quantised(layer)
    assert (dense_weight(layer) - first).abs().max() < 0.2 * first.abs().max()
    assert not is_quantised(model.model.layers[0].self_attn.q_proj)  # which transformers had left so
    assert describe_storage(model, "nf4").startswith("linear weights nf4, but 11%")
    inject_adapter(model, ALL)
    assert len(moka_layers(model)) == 2 * (4 + 2 * 4)
    unload(model)
    assert is_quantised(model.get_submodule("model.layers.0.mlp.experts.2.gate_up_proj"))


def test_falcon_s_own_kind_of_linear_layer_is_quantised_and_routers_are_not() -> None:
    for name, part, quantised in (("Falcon", "dense", True), ("LLaMA 4", "router", False)):
        model = tiny_model(KINDS[name])
        quantise_rest(model, "nf4", True, torch.float32)
        found = [is_quantised(m) for key, m in model.named_modules() if key.endswith(f".{part}")]
        assert found
        assert set(found) == {quantised}


def test_experts_that_nothing_names_stay_fused() -> None:
    excluded = MokaConfig(components=2, target_modules="all-linear", exclude_modules=r".*\.experts\..*")
    for config in (MokaConfig(components=2), excluded):
        model = tiny_model(KINDS["Qwen2 MoE"])
        names = inject_adapter(model, config)
        assert list(fused_experts(model))
        assert not any(".experts." in key for key in names)


def test_what_computes_otherwise_is_not_split() -> None:
    model = tiny_model(KINDS["Mixtral"])
    for _, module in fused_experts(model):
        plain = type(module).forward
        module.forward = lambda *args, plain=plain, module=module: 2 * plain(module, *args)
    split_experts(model)
    assert not any(isinstance(module, SplitExperts) for module in model.modules())


def test_a_lora_of_experts_is_refused() -> None:
    model = tiny_model(KINDS["Mixtral"])
    names = inject_adapter(model, ALL)
    with pytest.raises(ConfigError, match=r"no engine reads a LoRA of model.layers.0.mlp.experts"):
        check_no_experts(model, names)
    check_no_experts(model, [key for key in names if ".experts." not in key])


def test_steps_with_split_experts_are_not_recorded() -> None:
    model = tiny_model(KINDS["Mixtral"])
    assert "experts" not in (capture_unsupported_reason(model) or "")
    split_experts(model)
    assert "experts are computed one after another" in (capture_unsupported_reason(model) or "")


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_experts_that_peft_adapts_count_as_adapted() -> None:
    peft = pytest.importorskip("peft")
    model, config = tiny_model(KINDS["Mixtral"]), peft.LoraConfig(r=2, target_modules="all-linear")
    names = inject_adapter(model, config)
    assert ("experts in fused weights" in left_out(model, config)) != any("experts" in name for name in names)
