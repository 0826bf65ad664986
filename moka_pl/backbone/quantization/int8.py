"""8-bit weights of bitsandbytes, one scale a row: the storage of LLM.int8()."""

from collections.abc import Mapping
from typing import Self

import torch
from torch import Tensor

from moka_pl.backbone.quantization.stored import QuantConfig, StoredWeight, check_sizes
from moka_pl.errors import BackboneError


class Int8Weight(StoredWeight):
    """``W_ij = c_ij a_i / 127`` with codes c in int8 and a_i the largest absolute entry of a row.

    LLM.int8()'s own product rounds its input to 8 bits, too: its forward pass is not that of any W, and a
    gradient or a merge would be another function's. Here the product is that with the dequantised W.

    Source: Dettmers et al., https://arxiv.org/abs/2208.07339, section 2.
    """

    kind = "int8"

    parts = ("weight", "SCB")
    optional_parts = ("weight_format",)

    @classmethod
    def read_parts(
        cls,
        parts: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
        config: QuantConfig,
    ) -> tuple[Tensor, Self]:
        """As :meth:`StoredWeight.read_parts`: a ``Linear8bitLt`` as transformers saves it."""
        check_sizes(parts, {"weight": shape, "SCB": shape[:1]})
        if int(parts.get("weight_format", torch.tensor(0))) != 0:
            raise BackboneError("weight_format is not 0, that of rows; quantise the model again")
        return parts["weight"], cls(shape, dtype, {"absmax": parts["SCB"].float()})

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
