"""Products in 8-bit floats: activations by rows, a frozen 4-bit weight by rows or columns."""

from moka_pl.ops.triton.float8.operands import Scaled, WeightScales, scale_rows, scale_weight

__all__ = ["Scaled", "WeightScales", "scale_rows", "scale_weight"]
