"""GPT-2's Conv1D as linear layers, in memory and on disk."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.pytorch_utils import Conv1D

from moka_pl.adapters import MokaConfig, inject_adapter, merge, moka_layers, unload
from moka_pl.adapters.directory import load_adapter, save_adapter
from moka_pl.adapters.reading import BaseModel
from moka_pl.backbone import fingerprint
from moka_pl.backbone.linear_layers import conv1d_names, linearise, restore
from moka_pl.errors import AdapterError
from moka_pl.export.merged import merged_parts

IDS = torch.randint(4, 90, (2, 9), generator=torch.Generator().manual_seed(3))


@pytest.fixture
def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    return GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2)).eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def test_linear_layers_compute_the_same_and_are_undone_bit_for_bit(gpt2: GPT2LMHeadModel) -> None:
    before, weights = logits(gpt2), {name: p.clone() for name, p in gpt2.named_parameters()}
    names = conv1d_names(gpt2)
    assert len(names) == 8
    linearise(gpt2)
    assert not any(isinstance(module, Conv1D) for module in gpt2.modules())
    layer = gpt2.get_submodule(names[0])
    assert (layer.in_features, layer.out_features) == (32, 96)
    torch.testing.assert_close(logits(gpt2), before)
    restore(gpt2)
    assert conv1d_names(gpt2) == [name for name, m in gpt2.named_modules() if isinstance(m, Conv1D)]
    assert all(torch.equal(p, weights[name]) for name, p in gpt2.named_parameters())


def test_a_llama_is_left_alone(tiny_llama: nn.Module) -> None:
    before = list(tiny_llama.modules())
    linearise(tiny_llama)
    restore(tiny_llama)
    assert conv1d_names(tiny_llama) == []
    assert all(one is other for one, other in zip(before, tiny_llama.modules(), strict=True))


def test_an_adapter_of_conv1d_is_trained_merged_saved_and_taken_out(
    gpt2: GPT2LMHeadModel, randomize, tmp_path: Path
) -> None:
    plain = logits(gpt2)
    config = MokaConfig(components=2)
    assert inject_adapter(gpt2, config) == [f"transformer.h.{i}.attn.c_attn" for i in range(2)]
    randomize(gpt2)
    adapted = logits(gpt2)
    assert (adapted - plain).abs().max() > 0.1
    parts = {part.name: part.make() for part in merged_parts(gpt2)}
    assert all(tuple(parts[part.name].shape) == part.shape for part in merged_parts(gpt2))
    delta = moka_layers(gpt2)["transformer.h.0.attn.c_attn"].get_delta_weight().detach()
    merge(gpt2)
    torch.testing.assert_close(logits(gpt2), adapted, rtol=1e-3, atol=1e-4)
    saved = save_adapter(tmp_path / "adapter", gpt2, config, BaseModel("gpt2", None, fingerprint(gpt2)))
    weight = gpt2.transformer.h[0].attn.c_attn.base_layer.weight.detach().clone()
    unload(gpt2)
    assert isinstance(gpt2.transformer.h[0].attn.c_attn, Conv1D)
    torch.testing.assert_close(gpt2.transformer.h[0].attn.c_attn.weight.T, weight)
    torch.testing.assert_close(parts["transformer.h.0.attn.c_attn.weight"].T, weight + delta)
    load_adapter(gpt2, saved, fingerprint(gpt2))
    torch.testing.assert_close(logits(gpt2), adapted, rtol=1e-3, atol=1e-4)
    unload(gpt2, merge=True)
    assert {name: p.shape for name, p in gpt2.named_parameters()} == {
        name: parts[name].shape for name in parts
    }
    torch.testing.assert_close(logits(gpt2), adapted, rtol=1e-3, atol=1e-4)


def test_what_cannot_be_injected_leaves_the_model_as_it_is(gpt2: GPT2LMHeadModel) -> None:
    with pytest.raises(AdapterError, match="matches no layer"):
        inject_adapter(gpt2, MokaConfig(target_modules=["no_such"]))
    assert isinstance(gpt2.transformer.h[0].attn.c_attn, Conv1D)
