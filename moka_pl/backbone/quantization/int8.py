"""8-bit weights of bitsandbytes, one scale a row: the storage of LLM.int8()."""

from typing import Self

import torch
from torch import Tensor

from moka_pl.backbone.quantization.stored import LayerTensors, MadeWeight, ReadWeight
from moka_pl.errors import BackboneError


class Int8Weight(MadeWeight, ReadWeight):
    """``W_ij = c_ij a_i / 127`` with codes c in int8 and a_i the largest absolute entry of a row.

    LLM.int8()'s own product rounds its input to 8 bits, too: its forward pass is not that of any W, and a
    gradient or a merge would be another function's. Here the product is that with the dequantised W.

    Source: Dettmers et al., https://arxiv.org/abs/2208.07339, section 2.
    """

    kind = "int8"
    parts = ("weight", "SCB")
    optional_parts = ("weight_format",)

    @classmethod
    def read_layer(cls, layer: LayerTensors) -> tuple[Tensor, Self]:
        """As :meth:`ReadWeight.read_layer`: a ``Linear8bitLt`` as transformers saves it."""
        parts = layer.tensors
        layer.check({"weight": layer.shape, "SCB": layer.shape[:1]})
        if int(parts.get("weight_format", torch.tensor(0))) != 0:
            raise BackboneError("weight_format is not 0, that of rows; quantise the model again")
        return parts["weight"], cls(layer.shape, layer.dtype, {"absmax": parts["SCB"].float()})

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Self]:
        """Quantises W, (m, n), by bitsandbytes, which rounds it to float16 first."""
        from bitsandbytes import functional

        codes, scales, _ = functional.int8_vectorwise_quant(weight.to(torch.float16))  # (m, n), (m,)
        return codes, cls((weight.shape[0], weight.shape[1]), weight.dtype, {"absmax": scales})

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n), by bitsandbytes."""
        from bitsandbytes import functional

        weight = functional.int8_vectorwise_dequant(codes.view(self.shape), self.scales["absmax"])  # (m, n)
        return weight.to(self.dtype)  # type: ignore[no-any-return]
