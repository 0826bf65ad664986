"""Checkpoints that are quantised already, written here by the layouts' published formulas."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM

from moka_pl.backbone import BackboneConfig, load_backbone, weight_samples
from moka_pl.backbone.quantization import QuantisedError, dense_weight, quantised_linear
from moka_pl.backbone.quantization.grouped import AwqWeight, GptqWeight
from moka_pl.backbone.quantization.stored import LayerTensors
from moka_pl.backbone.random_weights import byte_tokenizer
from moka_pl.errors import BackboneError
from moka_pl.inference.load import load_base

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def pack_rows(codes: numpy.ndarray, bits: int) -> Tensor:
    """Codes of neighbouring rows in a word, the first one in its lowest bits."""
    per = 32 // bits
    words = numpy.zeros((len(codes) // per, codes.shape[1]), dtype=numpy.uint32)
    for row in range(len(codes)):
        words[row // per] |= codes[row].astype(numpy.uint32) << numpy.uint32(bits * (row % per))
    return torch.from_numpy(words.view(numpy.int32))


def pack_columns(codes: numpy.ndarray, bits: int, order: list[int] | None = None) -> Tensor:
    per = 32 // bits
    order = order or list(range(per))
    words = numpy.zeros((len(codes), codes.shape[1] // per), dtype=numpy.uint32)
    for column in range(words.shape[1]):
        for place, own in enumerate(order):
            code = codes[:, per * column + own].astype(numpy.uint32)
            words[:, column] |= code << numpy.uint32(bits * place)
    return torch.from_numpy(words.view(numpy.int32))


class Groups:
    """Random codes (n, m), scales and zero points (groups, m), and the W, (m, n), that they mean."""

    def __init__(self, m: int, n: int, bits: int = 4, groups: int = 2, seed: int = 0, order: bool = False):
        draw = numpy.random.default_rng(seed)
        self.codes = draw.integers(0, 2**bits, (n, m))
        self.zeros = draw.integers(1, 2**bits, (groups, m))
        self.scales = torch.from_numpy(draw.uniform(0.005, 0.02, (groups, m))).half()
        self.group = numpy.arange(n) // (n // groups)
        if order:
            self.group = draw.permutation(self.group)
        exact = (self.codes - self.zeros[self.group]) * self.scales.double().numpy()[self.group]
        self.weight = torch.from_numpy(exact.T.copy()).float()

    def gptq(self, bits: int = 4, form: str = "gptq", order: bool = False) -> dict[str, Tensor]:
        zeros = self.zeros - 1 if form == "gptq" else self.zeros
        parts = {"qweight": pack_rows(self.codes, bits), "qzeros": pack_columns(zeros, bits)}
        index = {"g_idx": torch.from_numpy(self.group).int()} if order else {}
        return parts | {"scales": self.scales} | index

    def awq(self) -> dict[str, Tensor]:
        packed = (pack_columns(codes, 4, AWQ_ORDER) for codes in (self.codes, self.zeros))
        return dict(zip(("qweight", "qzeros"), packed, strict=True)) | {"scales": self.scales}


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


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "load_in_4bit": False},
}


def parts_of(kind: str, layer: nn.Linear, seed: int) -> tuple[dict[str, Tensor], Tensor]:
    """The tensors of a layer of random codes, and its W."""
    if kind == "int8":
        made = quantised_linear(layer, layer.weight.detach(), "int8", True, torch.float32)
        codes = made.weight.data.view(layer.weight.shape)
        return {"weight": codes, "SCB": made.stored.scales["absmax"]}, dense_weight(made)
    groups = Groups(layer.out_features, layer.in_features, seed=seed, order=kind == "gptq")
    return groups.gptq(order=True) if kind == "gptq" else groups.awq(), groups.weight


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def dense(make_llama: Callable[..., LlamaForCausalLM]) -> LlamaForCausalLM:
    sizes = {"vocab_size": 260, "hidden_size": 64, "intermediate_size": 128}
    return make_llama(**sizes, num_hidden_layers=1, tie_word_embeddings=True)


@pytest.fixture
def folder(kind: str, dense: LlamaForCausalLM, tmp_path: Path) -> Path:
    """A checkpoint with one layer as it was, and biases of zeros that the model lacks; W goes into dense."""
    path = tmp_path / "model"
    dense.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    for seed, (name, layer) in enumerate(dense.model.named_modules(prefix="model")):
        if isinstance(layer, nn.Linear) and not name.endswith("down_proj"):
            del tensors[f"{name}.weight"]
            parts, weight = parts_of(kind, layer, seed)
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in parts.items()}
            tensors[f"{name}.bias"] = torch.zeros(layer.out_features)
            layer.weight.data = weight
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"quantization_config": CONFIGS[kind]}))
    return path


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
