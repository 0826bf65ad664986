"""Weights of GPTQ and AWQ checkpoints, read as they are: packed codes, scales and zero points of groups.

Both store the transpose of W, with groups of a column's entries. Their scales have at most 11 significant
bits and the codes few, so that ``(c - z) s`` is exact in float32 and is rounded once, to the compute dtype.
"""

from typing import Self

import torch
from torch import Tensor

from moka_pl.backbone.quantization.packing import unpack_words
from moka_pl.backbone.quantization.stored import LayerTensors, QuantConfig, ReadWeight
from moka_pl.errors import BackboneError

#: One in each code of a word, by bits.
_ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}


def _half(scales: Tensor) -> Tensor:
    """Scales in 16 bits, as they are: those in bfloat16 may lie beyond float16."""
    return scales if scales.dtype == torch.bfloat16 else scales.to(torch.float16)


class GptqWeight(ReadWeight):
    """``W_ji = (c_ij - z_gj) s_gj`` with g the group of the input i, codes packed along the inputs.

    Format ``gptq`` stores z - 1, format ``gptq_v2`` z itself. ``g_idx`` tells each input's group: with
    ``desc_act`` any order.

    Source: Frantar et al., https://arxiv.org/abs/2210.17323; layout: AutoGPTQ, GPTQModel.
    """

    kind = "gptq"
    parts = ("qweight", "qzeros", "scales")
    optional_parts = ("g_idx",)

    def __init__(
        self, shape: tuple[int, int], dtype: torch.dtype, scales: dict[str, Tensor], bits: int = 4
    ) -> None:
        super().__init__(shape, dtype, scales)
        self.bits = bits

    @classmethod
    def unreadable_reason(cls, config: QuantConfig) -> str | None:
        """Refuses other layouts than GPTQ's own two."""
        bits, form = config.get("bits"), config.get("checkpoint_format", config.get("format", "gptq"))
        if bits not in _ONES:
            return f"of {bits} bits; only {', '.join(map(str, _ONES))} are read"
        if form not in ("gptq", "gptq_v2") or config.get("is_marlin_format"):
            return f"in the layout {'marlin' if config.get('is_marlin_format') else form}"
        return None

    @classmethod
    def read_layer(cls, layer: LayerTensors) -> tuple[Tensor, Self]:
        """As :meth:`ReadWeight.read_layer`."""
        parts, config, (m, n) = layer.tensors, layer.config, layer.shape
        groups = len(parts["scales"])
        qweight, qzeros = parts["qweight"], parts["qzeros"]
        bits = 32 * len(qweight) / n  # ``dynamic`` of GPTQModel gives layers others than config.json
        bits = int(bits) if bits in _ONES else config["bits"]
        layer.check(
            {"qweight": (n * bits // 32, m), "qzeros": (groups, m * bits // 32), "scales": (groups, m)}
        )
        if config.get("checkpoint_format", config.get("format", "gptq")) == "gptq":
            qzeros = qzeros + _ONES[bits]  # in words, as it was subtracted
        if (index := parts.get("g_idx")) is None:  # the last group may be smaller than the others
            size = config.get("group_size") or -(-n // groups)
            size = n if size == -1 else size
            if -(-n // size) != groups:
                raise BackboneError(
                    f"scales has {groups} groups, but group_size is {size} of {n} inputs; copy the model "
                    "again"
                )
            index = torch.arange(n, device=qweight.device) // size
        if tuple(index.shape) != (n,) or int(index.min()) < 0 or int(index.max()) >= groups:
            raise BackboneError(
                f"g_idx does not name one of {groups} groups for each input; copy the model again"
            )
        own = {"zeros": qzeros, "group": index.to(torch.int32)}
        scales = {"scales": _half(parts["scales"]), **own}
        return qweight, cls(layer.shape, layer.dtype, scales, bits)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n)."""
        m, n = self.shape
        words = codes.view(-1, m)  # (n / codes in a word, m)
        numbers = unpack_words(words, self.bits).transpose(1, 2).reshape(n, m)  # (n, m)
        zeros = unpack_words(self.scales["zeros"], self.bits).reshape(-1, m)  # (groups, m)
        group = self.scales["group"]
        weight = numbers.float().sub_(zeros[group]).mul_(self.scales["scales"][group])  # (n, m)
        return weight.to(self.dtype).t().contiguous()  # (m, n)


class AwqWeight(ReadWeight):
    """``W_ji = (c_ij - z_gj) s_gj`` with g = i // group size, codes packed along the outputs, interleaved.

    Source: Lin et al., https://arxiv.org/abs/2306.00978; layout: AutoAWQ's ``gemm``.
    """

    kind = "awq"
    parts = ("qweight", "qzeros", "scales")

    @classmethod
    def unreadable_reason(cls, config: QuantConfig) -> str | None:
        """Refuses other layouts than ``gemm``; one without ``zero_point`` has zero points of 8."""
        bits, version = config.get("bits", config.get("w_bit", 4)), str(config.get("version", "gemm")).lower()
        if bits != 4:
            return f"of {bits} bits; only 4 are read"
        return None if version == "gemm" else f"in the layout {version}"

    @classmethod
    def read_layer(cls, layer: LayerTensors) -> tuple[Tensor, Self]:
        """As :meth:`ReadWeight.read_layer`."""
        parts, (m, n) = layer.tensors, layer.shape
        groups = len(parts["scales"])
        layer.check({"qweight": (n, m // 8), "qzeros": (groups, m // 8), "scales": (groups, m)})
        if n % groups:
            raise BackboneError(f"{groups} groups do not divide {n} inputs; copy the model again")
        scales = {"scales": _half(parts["scales"]), "zeros": parts["qzeros"]}
        return parts["qweight"], cls(layer.shape, layer.dtype, scales)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n)."""
        m, n = self.shape
        scales = self.scales["scales"][:, None]  # (groups, 1, m)
        zeros = self._unpacked(self.scales["zeros"]).view(-1, 1, m)  # (groups, 1, m)
        numbers = self._unpacked(codes.view(n, -1)).view(len(scales), -1, m)  # (groups, size, m)
        return numbers.float().sub_(zeros).mul_(scales).to(self.dtype).view(n, m).t().contiguous()  # (m, n)

    def _unpacked(self, words: Tensor) -> Tensor:
        codes = unpack_words(words, 4)  # (k, m / 8, 8)
        # Of eight neighbouring outputs the first, third, ... come first. A list of indices would be copied to
        # the GPU each time, which CUDA graphs do not allow.
        return codes.view(*words.shape, 2, 4).transpose(-1, -2).flatten(1)  # (k, m)
