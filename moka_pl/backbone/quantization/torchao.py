"""Weights of torchao: 4-bit integers by groups, and 8-bit floating-point numbers by rows."""

from typing import Self

import torch
from torch import Tensor

from moka_pl.backbone.quantization.packing import pack_halves, unpack_halves
from moka_pl.backbone.quantization.stored import MadeWeight
from moka_pl.utils import silenced

#: Entries of a row that share a scale, where a row has a multiple of them; else the next size.
_GROUPS = (64, 32, 16)
_INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]


class _TorchaoWeight(MadeWeight):
    """A weight that torchao makes and reads."""

    @classmethod
    def import_package(cls) -> None:
        """Imports torchao's tensors; it warns of kernels for devices that are not here."""
        with silenced("torchao"):
            from torchao.quantization import Float8Tensor, IntxUnpackedToInt8Tensor  # noqa: F401


class Int4Weight(_TorchaoWeight):
    """``W_ij = (c_ij - z_ig) s_ig`` with c of 4 bits, a scale s and a zero point z for a group g of a row.

    torchao holds its codes one a byte where no kernel for a GPU reads them; here two are in a byte.
    """

    kind = "int4"

    @classmethod
    def unsupported_reason(cls, m: int, n: int) -> str | None:
        """Refuses rows that no group divides."""
        return None if n % _GROUPS[-1] == 0 else f"it takes rows of multiples of {_GROUPS[-1]} entries"

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Self]:
        """Quantises W, (m, n), by torchao."""
        from torchao.quantization import IntxUnpackedToInt8Tensor, MappingType

        m, n = weight.shape
        group = next(size for size in _GROUPS if n % size == 0)
        block, asymmetric = (1, group), MappingType.ASYMMETRIC
        made = IntxUnpackedToInt8Tensor.from_hp(weight, block, _INT4, mapping_type=asymmetric)
        scales = {"scale": made.scale, "zero_point": made.zero_point}  # (m, n / group) both
        return pack_halves((made.qdata + 8).to(torch.uint8)), cls((m, n), weight.dtype, scales)

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n), by torchao."""
        from torchao.quantization import IntxUnpackedToInt8Tensor

        scale, zero_point = self.scales["scale"], self.scales["zero_point"]
        group = self.shape[1] // scale.shape[1]
        numbers = (unpack_halves(codes).view(self.shape).to(torch.int8)) - 8  # (m, n)
        weight = IntxUnpackedToInt8Tensor(
            numbers, scale, zero_point, _INT4, (1, group), self.dtype, activation_quantization=None
        )
        return weight.dequantize()  # type: ignore[no-any-return]


class Float8Weight(_TorchaoWeight):
    """``W_ij = c_ij s_i`` with c of 8 bits, four of them the exponent's (E4M3), and a scale s for a row."""

    kind = "float8"

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Self]:
        """Quantises W, (m, n), by torchao, with PyTorch's own operations on every device."""
        from torchao.quantization import Float8Tensor, PerRow
        from torchao.quantization.quantize_.common import KernelPreference

        made = Float8Tensor.from_hp(
            weight, torch.float8_e4m3fn, PerRow(), kernel_preference=KernelPreference.TORCH
        )
        # As bytes: few operations take 8-bit floating-point numbers.
        codes = made.qdata.view(torch.uint8)
        return codes, cls((weight.shape[0], weight.shape[1]), weight.dtype, {"scale": made.scale})

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n), by torchao."""
        from torchao.quantization import Float8Tensor

        numbers = codes.view(self.shape).view(torch.float8_e4m3fn)  # (m, n)
        weight = Float8Tensor(numbers, self.scales["scale"], [1, self.shape[1]], dtype=self.dtype)
        return weight.dequantize()  # type: ignore[no-any-return]
