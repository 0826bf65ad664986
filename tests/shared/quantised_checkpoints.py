"""Checkpoints that are quantised already, written by the layouts' published formulas."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from moka_pl.backbone import BackboneConfig
from moka_pl.backbone.quantization import dense_weight, quantised_linear
from moka_pl.backbone.random_weights import byte_tokenizer

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


class Checkpoint(NamedTuple):
    """A folder with layers of one kind, and the model that it means, in plain weights."""

    kind: str
    folder: Path
    dense: LlamaForCausalLM

    @property
    def config(self) -> BackboneConfig:
        return BackboneConfig(str(self.folder), quantization=self.kind)


def write_checkpoint(kind: str, dense: LlamaForCausalLM, path: Path) -> Checkpoint:
    """One layer stays as it is, and there are biases of zeros that the model lacks; W goes into dense."""
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
    return Checkpoint(kind, path, dense)
