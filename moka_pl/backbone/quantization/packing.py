"""Several codes in a byte or a word."""

import torch
from torch import Tensor


def pack_halves(codes: Tensor) -> Tensor:
    """Packs codes of 4 bits, an even number of uint8, two to a byte, the first in the lower half."""
    pairs = codes.reshape(-1, 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def unpack_halves(packed: Tensor) -> Tensor:
    """Returns what :func:`pack_halves` was given, flat."""
    flat = packed.reshape(-1)
    return torch.stack([flat & 15, flat >> 4], 1).view(-1)
