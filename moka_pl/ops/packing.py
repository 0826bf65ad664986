"""Factors of one layer as two flat vectors: all left ones in the first, all right ones in the second.

Few large parameters in place of twenty small ones: a step then costs few optimizer, autograd and launch
calls, which is what bounds small models on a GPU.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate

import torch
from torch import Tensor

from moka_pl.ops.layout import Shape

Pairs = list[tuple[Tensor | None, Tensor]]


@cache
def left_sizes(shapes: tuple[Shape, ...]) -> list[int]:
    """Entries of every left factor; none for an identity."""
    return [0 if s.identity else s.m_a * s.n_a for s in shapes]


@cache
def right_sizes(shapes: tuple[Shape, ...]) -> list[int]:
    """Entries of every right factor."""
    return [s.m_b * s.n_b for s in shapes]


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each stretch begins in a vector of stretches of these sizes."""
    return list(accumulate(sizes, initial=0))[:-1]


def pack(factors: Sequence[tuple[Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
    """Packs r pairs (A_i or None, B_i) into the two vectors."""
    right = torch.cat([b.reshape(-1) for _, b in factors])
    left = [a.reshape(-1) for a, _ in factors if a is not None]
    return torch.cat(left) if left else right.new_empty(0), right


def unpack(left: Tensor | None, right: Tensor, shapes: tuple[Shape, ...]) -> Pairs:
    """Views of the two vectors as r pairs (A_i of (m_a, n_a) or None, B_i of (m_b, n_b))."""
    rights = torch.split(right, right_sizes(shapes))
    lefts = rights if left is None else torch.split(left, left_sizes(shapes))
    return [
        (None if s.identity else a.view(s.m_a, s.n_a), b.view(s.m_b, s.n_b))
        for a, b, s in zip(lefts, rights, shapes, strict=True)
    ]
