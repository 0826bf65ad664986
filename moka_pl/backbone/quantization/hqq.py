"""4-bit weights of HQQ."""

from typing import Any, Self

import torch
from torch import Tensor

from moka_pl.backbone.quantization.stored import MadeWeight

_GROUP = 64


class HqqWeight(MadeWeight):
    """``W = (c - z) s`` with c of 4 bits, and a scale s and a real zero point z for 64 entries.

    s and z minimise a norm of the error that large errors count little in.

    Source: Badri and Shaji, https://mobiusml.github.io/hqq_blog/.
    """

    kind = "hqq"

    @classmethod
    def import_package(cls) -> None:
        """Imports hqq's quantiser."""
        from hqq.core.quantize import Quantizer  # noqa: F401

    @classmethod
    def unsupported_reason(cls, m: int, n: int) -> str | None:
        """Refuses what does not fill the groups, two of which lie in the same bytes."""
        return None if m * n % (2 * _GROUP) == 0 else f"it takes multiples of {2 * _GROUP} entries"

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Self]:
        """Quantises W, (m, n), by hqq; scales and zero points are kept in W's dtype, as there."""
        from hqq.core.quantize import Quantizer

        options = {"nbits": 4, "group_size": _GROUP, "axis": 1, "compute_dtype": weight.dtype}
        codes, meta = Quantizer.quantize(weight, device=str(weight.device), **options)
        scales = {name: meta[name].to(weight.dtype) for name in ("scale", "zero")}  # (m n / 64, 1) both
        return codes, cls((weight.shape[0], weight.shape[1]), weight.dtype, scales)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n), by hqq."""
        from hqq.core.quantize import Quantizer

        meta: dict[str, Any] = {
            "nbits": 4,
            "group_size": _GROUP,
            "axis": 1,
            "packing": "4bit_u8",
            "view_as_float": False,
            "unpack_view_dtype": torch.uint8,
            "compute_dtype": self.dtype,
            "shape": self.shape,
            **self.scales,
        }
        return Quantizer.dequantize(codes.view(-1, _GROUP), meta)  # type: ignore[no-any-return]
