"""The reference of the kernels' rounding: W + ΔW to bfloat16, with small updates kept on average.

Rounding to nearest would lose every update smaller than half a step of W's value. Here each entry has a
threshold, always the same one, and the thresholds are spread evenly: of entries that lie a share p of a step
above their lower neighbour a share p is rounded up. A value that is exact in bfloat16 stays itself.
"""

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF


def round_by_thresholds(total: Tensor) -> Tensor:
    """Rounds a float32 matrix, (m, n), to bfloat16, each entry by its own threshold; a NaN stays one."""
    (m, n), device = total.shape, total.device
    row = torch.arange(m, device=device) * 0x9E3779B1 & _WORD
    row = (row ^ (row >> 15)) * 0x85EBCA77 & _WORD
    column = torch.arange(n, device=device) * 0xC2B2AE3D & _WORD
    column = (column ^ (column >> 13)) * 0x27D4EB2F & _WORD
    mixed = (row[:, None] ^ column[None, :]) * 0x9E3779B1 & _WORD  # (m, n)
    thresholds = mixed >> 16  # whole numbers from 0 to 65535 in units of 2^-16 steps
    bits = total.contiguous().view(torch.int32).long() & _WORD
    high = (bits + thresholds) >> 16
    # As a signed number of 16 bits.
    rounded = (high - ((high >> 15) << 16)).to(torch.int16).view(torch.bfloat16)
    return torch.where(total.isnan(), total.bfloat16(), rounded)
