"""Products in 8-bit floats: activations by rows, a frozen 4-bit weight by rows or columns."""

from moka_pl.ops.triton.float8.operands import Scaled, WeightScales, scale_rows, scale_weight
from moka_pl.ops.triton.float8.products import DIVISOR, multiply, scale_input, unsupported_reason

__all__ = [
    "DIVISOR",
    "Scaled",
    "WeightScales",
    "multiply",
    "scale_input",
    "scale_rows",
    "scale_weight",
    "unsupported_reason",
]
