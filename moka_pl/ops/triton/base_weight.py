"""Where a kernel reads the frozen weight from: a dense matrix, or NF4 as bitsandbytes stores it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState


@dataclass(frozen=True, eq=False)
class WeightSource:
    """A frozen m × n weight.

    Attributes:
        data: The matrix itself, or two 4-bit numbers a byte.
        absmax: Scale of every ``blocksize`` entries, float32, or uint8 where the scales are quantised too.
        code: Values of the sixteen 4-bit numbers; None for a dense matrix.
        blocksize: Entries that share a scale.
        nested: Values, scales and offset of quantised scales, or None.
    """

    data: Tensor
    absmax: Tensor | None = None
    code: Tensor | None = None
    blocksize: int = 0
    nested: tuple[Tensor, Tensor, Tensor] | None = None


def weight_source(data: Tensor, state: "QuantState | None") -> WeightSource | None:
    """Describes a weight for the kernels, or returns None for a storage that they do not read.

    Args:
        data: A dense weight, or the packed numbers of a 4-bit one.
        state: bitsandbytes' description of a 4-bit weight; None for a dense one.
    """
    if state is None:
        return WeightSource(data)
    if state.quant_type != "nf4" or state.blocksize % 16 or getattr(state, "packing_format_for_cpu", False):
        return None
    nested = None
    if state.nested:
        if state.state2.blocksize != 256:
            return None
        nested = (state.state2.code, state.state2.absmax, state.offset)
    return WeightSource(data, state.absmax, state.code, state.blocksize, nested)
