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


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """Returns the codes in words of 32 bits, the lowest first: uint8, (..., codes in a word).

    Args:
        words: int32, of any shape.
        bits: Bits of a code: 2, 4 or 8.
    """
    flat = words.contiguous().view(torch.uint8).view(*words.shape, 4)  # of the lowest byte first
    parts = [(flat >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
    return torch.stack(parts, -1).flatten(-2)
