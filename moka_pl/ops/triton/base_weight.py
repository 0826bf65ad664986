"""How a kernel reads the frozen weight: from a dense matrix, or from 4-bit numbers with scales (NF4)."""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor


@dataclass(frozen=True, eq=False)
class WeightSource:
    """A frozen m × n weight.

    Attributes:
        data: The matrix itself, or two 4-bit numbers a byte.
        absmax: Scale of every ``blocksize`` entries, float32, or uint8 where the scales are quantised too.
        code: Values of the sixteen 4-bit numbers; None for a dense matrix.
        blocksize: Entries that share a scale.
        nested: Values, scales (of 256 each) and offset of quantised scales, or None.
    """

    data: Tensor
    absmax: Tensor | None = None
    code: Tensor | None = None
    blocksize: int = 0
    nested: tuple[Tensor, Tensor, Tensor] | None = None


def frozen_arguments(source: WeightSource | None, filler: Tensor) -> tuple[tuple[Tensor, ...], int, bool]:
    """Returns what :func:`frozen_weight` reads W by: six pointers, BLOCKSIZE and NESTED.

    Pointers that a variant does not read are ``filler``, which can be any tensor.
    """
    if source is None:
        return (filler,) * 6, 0, False
    if source.code is None:
        return (source.data, *(filler,) * 5), 0, False
    assert source.absmax is not None
    nested = source.nested or (filler,) * 3
    pointers = (source.data, source.absmax, source.code, *nested)
    return pointers, source.blocksize, source.nested is not None


@triton.jit  # type: ignore[untyped-decorator]
def frozen_weight(  # type: ignore[no-untyped-def]
    data, absmax, code, outer_code, outer_absmax, offset, flat, run,
    DTYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """W at flat indices, all inside; those that start at the same entry of ``run`` share one scale.

    Reference: :func:`moka_pl.backbone.quantization.dense_weight`, rounded to DTYPE.
    """
    if BLOCKSIZE > 0:
        number = (tl.load(data + flat // 2).to(tl.int32) >> (4 - 4 * (flat % 2))) & 15
        block = run // BLOCKSIZE
        if NESTED:
            largest = tl.load(outer_code + tl.load(absmax + block).to(tl.int32))
            largest = largest * tl.load(outer_absmax + block // 256) + tl.load(offset)
        else:
            largest = tl.load(absmax + block)
        value = tl.load(code + number) * largest
    else:
        value = tl.load(data + flat).to(tl.float32)
    return value.to(DTYPE).to(tl.float32)
