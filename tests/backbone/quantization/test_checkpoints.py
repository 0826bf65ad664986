"""Checkpoints that are quantised already, written here by the layouts' published formulas."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shared.quantised_checkpoints import Checkpoint, Groups
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from moka_pl.backbone import BackboneConfig, load_backbone, weight_samples
from moka_pl.backbone.quantization import QuantisedError, dense_weight
from moka_pl.backbone.quantization.grouped import AwqWeight, GptqWeight
from moka_pl.backbone.quantization.stored import LayerTensors
from moka_pl.errors import BackboneError
from moka_pl.inference.load import load_base


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    form=st.sampled_from(["gptq", "gptq_v2"]),
    order=st.booleans(),
    sizes=st.tuples(st.sampled_from([16, 48]), st.sampled_from([32, 64])),
    seed=st.integers(0, 99),
)
def test_gptq_is_read_exactly(bits: int, form: str, order: bool, sizes: tuple[int, int], seed: int) -> None:
    groups = Groups(*sizes, bits=bits, seed=seed, order=order)
    config = {"bits": bits, "checkpoint_format": form}
    assert GptqWeight.unreadable_reason(config) is None
    read = GptqWeight.read_layer(LayerTensors(groups.gptq(bits, form, order), sizes, torch.float32, config))
    assert torch.equal(read[1].read(read[0].reshape(-1, 1)), groups.weight)


@settings(max_examples=10, deadline=None)
@given(sizes=st.tuples(st.sampled_from([16, 48]), st.sampled_from([8, 64])), seed=st.integers(0, 99))
def test_awq_is_read_exactly(sizes: tuple[int, int], seed: int) -> None:
    groups = Groups(*sizes, seed=seed)
    for dtype in (torch.float32, torch.bfloat16):
        codes, stored = AwqWeight.read_layer(LayerTensors(groups.awq(), sizes, dtype, {}))
        assert torch.equal(stored.read(codes.reshape(-1, 1)), groups.weight.to(dtype))


@pytest.mark.parametrize(
    ("kind", "config", "said"),
    [
        (GptqWeight, {"bits": 3}, "of 3 bits; only 2, 4, 8 are read"),
        (GptqWeight, {"bits": 4, "checkpoint_format": "marlin"}, "in the layout marlin"),
        (GptqWeight, {"bits": 4, "is_marlin_format": True}, "in the layout marlin"),
        (AwqWeight, {"bits": 8}, "of 8 bits; only 4 are read"),
        (AwqWeight, {"bits": 4, "version": "GEMV"}, "in the layout gemv"),
    ],
)
def test_other_layouts_are_not_read(kind: type, config: dict, said: str) -> None:
    assert kind.unreadable_reason(config) == said


def test_awq_without_zero_point_has_the_zero_points_of_its_file() -> None:
    """As GPTQModel writes symmetric ones: all of them 8."""
    groups = Groups(16, 64)
    groups.zeros[:] = 8
    config = {"bits": 4, "version": "gemm", "zero_point": False}
    assert AwqWeight.unreadable_reason(config) is None
    codes, stored = AwqWeight.read_layer(LayerTensors(groups.awq(), (16, 64), torch.float32, config))
    exact = (groups.codes - 8) * groups.scales.double().numpy()[groups.group]
    assert torch.equal(stored.read(codes.reshape(-1, 1)), torch.from_numpy(exact.T.copy()).float())


def test_a_layer_of_gptq_may_have_other_bits_than_the_others() -> None:
    """As GPTQModel's ``dynamic`` asks for: config.json names the bits of the others."""
    groups = Groups(16, 64, bits=8)
    parts, config = groups.gptq(8, order=True), {"bits": 4, "group_size": 64, "checkpoint_format": "gptq"}
    codes, stored = GptqWeight.read_layer(LayerTensors(parts, (16, 64), torch.float32, config))
    assert torch.equal(stored.read(codes.reshape(-1, 1)), groups.weight)
    parts["qweight"] = parts["qweight"][:12]
    with pytest.raises(BackboneError, match=r"qweight is \(12, 16\), not \(8, 16\)"):
        GptqWeight.read_layer(LayerTensors(parts, (16, 64), torch.float32, config))


@pytest.mark.parametrize("factor", [1e-6, 1e7])
@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_scales_in_bfloat16_may_lie_beyond_float16(layout: str, factor: float) -> None:
    """GPTQModel stores those of AWQ in the model's dtype."""
    groups, reader = Groups(16, 64), GptqWeight if layout == "gptq" else AwqWeight
    parts = groups.gptq(order=True) if layout == "gptq" else groups.awq()
    scales = (groups.scales.double() * factor).bfloat16()
    layer = LayerTensors(parts | {"scales": scales}, (16, 64), torch.float32, {"bits": 4})
    codes, stored = reader.read_layer(layer)
    exact = (groups.codes - groups.zeros[groups.group]) * scales.double().numpy()[groups.group]
    assert torch.equal(stored.read(codes.reshape(-1, 1)), torch.from_numpy(exact.T.copy()).float())


class NoHostTensors(TorchDispatchMode):
    """Refuses tensors that nothing computed: made of Python's numbers, they would be copied to a GPU.

    Such a copy makes the GPU wait, and a CUDA graph cannot hold it.
    """

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.known = list(given)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        assert all(any(tensor is one for one in self.known) for tensor in tensors), func
        out = func(*args, **(kwargs or {}))
        self.known += [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        return out


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_dequantising_takes_nothing_from_the_host(layout: str) -> None:
    groups, reader = Groups(16, 64), GptqWeight if layout == "gptq" else AwqWeight
    parts = groups.gptq(order=True) if layout == "gptq" else groups.awq()
    codes, stored = reader.read_layer(LayerTensors(parts, (16, 64), torch.bfloat16, {"bits": 4}))
    with NoHostTensors(codes, *stored.scales.values()):
        stored.dequantise(codes)


def test_the_last_group_of_gptq_may_be_smaller() -> None:
    m, n, size = 16, 96, 64
    groups = Groups(m, n)
    groups.group = numpy.arange(n) // size
    exact = (groups.codes - groups.zeros[groups.group]) * groups.scales.numpy()[groups.group].astype(float)
    config = {"bits": 4, "group_size": size}
    layer = LayerTensors(groups.gptq(), (m, n), torch.float32, config)
    codes, stored = GptqWeight.read_layer(layer)
    assert torch.equal(stored.read(codes.reshape(-1, 1)), torch.from_numpy(exact.T.copy()).float())
    with pytest.raises(BackboneError, match="2 groups, but group_size is 96 of 96 inputs"):
        GptqWeight.read_layer(layer._replace(config=config | {"group_size": -1}))


@pytest.fixture
def kind(checkpoint: Checkpoint) -> str:
    return checkpoint.kind


@pytest.fixture
def dense(checkpoint: Checkpoint) -> LlamaForCausalLM:
    return checkpoint.dense


@pytest.fixture
def folder(checkpoint: Checkpoint) -> Path:
    return checkpoint.folder


def test_a_checkpoint_is_loaded_as_it_is(kind: str, folder: Path, dense: LlamaForCausalLM) -> None:
    loaded = load_backbone(BackboneConfig(str(folder), quantization=kind))
    assert any(f"is quantised already: {kind}" in note for note in loaded.notes)
    assert not any("not used" in note for note in loaded.notes)
    for name, layer in dense.model.named_modules(prefix="model"):
        if isinstance(layer, nn.Linear):
            assert torch.equal(dense_weight(loaded.model.get_submodule(name)), layer.weight)
    assert type(loaded.model.model.layers[0].mlp.down_proj) is nn.Linear
    ids = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, dense(ids).logits, atol=1e-4, rtol=1e-4)
    assert f"{kind}-float32" in weight_samples(loaded.model)


def test_another_quantisation_is_refused_and_what_only_reads_takes_it(kind: str, folder: Path) -> None:
    with pytest.raises(QuantisedError, match=f"quantised already, as {kind}, .* set .*quantization {kind}"):
        load_backbone(BackboneConfig(str(folder)))
    assert load_base(BackboneConfig(str(folder)), "cpu").config.quantization == kind


def test_damage_is_told(kind: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = "model.layers.0.self_attn.q_proj"
    part = "SCB" if kind == "int8" else "scales"
    save_file(tensors | {f"{name}.{part}": tensors[f"{name}.{part}"][:1]}, file, {"format": "pt"})
    config = BackboneConfig(str(folder), quantization=kind)
    with pytest.raises(BackboneError, match=rf"{name}: .* is \(.*\), not \(.*\); copy the model again"):
        load_backbone(config)
    save_file(tensors | {f"{name}.bias": torch.ones(64)}, file, {"format": "pt"})
    with pytest.raises(BackboneError, match=f"{name} has a bias, but config.json names none"):
        load_backbone(config)
    del tensors[f"{name}.{part}"]
    save_file(tensors, file, {"format": "pt"})
    told = (
        "holds torch.int8, no weights; copy" if kind == "int8" else f"layers in {kind} are not in safetensors"
    )
    with pytest.raises(BackboneError, match=told):
        load_backbone(config)


@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_nothing_is_quantised_so_here(kind: str, tmp_path: Path, make_llama: Callable) -> None:
    with pytest.raises(BackboneError, match=f"tiny is not quantised by {kind}, .* only reads that"):
        load_backbone(BackboneConfig("tiny", weights="random", quantization=kind))


def test_a_plan_knows_it(folder: Path, kind: str) -> None:
    from moka_pl.planning.shape import empty_model

    notes: list[str] = []
    empty_model(BackboneConfig(str(folder), quantization=kind), torch.float32, notes)
    assert any(f"quantised already: {kind}" in note for note in notes)
    with pytest.raises(QuantisedError, match=f"set --model.backbone.quantization {kind}"):
        empty_model(BackboneConfig(str(folder)), torch.float32, notes)
