"""``Σ_i w_i (A_i ⊗ B_i) x`` with an adapter of its own for each row of a batch, in a few batched products.

With X of one token as n_a × n_b, ``Y = A X Bᵀ``. The products are batched over the rows, so that there are
as many as for one adapter, however many adapters a batch has. Components of one shape share them, side by
side, as in :mod:`moka_pl.ops.structured`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import Shape, group_equal, left_sizes, right_sizes


class RowFactors(NamedTuple):
    """C components of one shape, of K adapters.

    Attributes:
        shape: Their shape.
        left_first: Whether left factors come first, which is what costs less.
        left: Left factors: (K, m_a C, n_a) where these come first, else (K, m_a, n_a C).
        right: Right factors with their weights: (K, C n_b, m_b) where left ones come first, else
            (K, n_b, C m_b).
    """

    shape: Shape
    left_first: bool
    left: Tensor
    right: Tensor


def stack_factors(left: Tensor, right: Tensor, weights: Tensor, shapes: Sequence[Shape]) -> list[RowFactors]:
    """Prepares the factors of K adapters with the same shapes for :func:`rows_update`.

    Args:
        left: Their packed left factors (see :mod:`moka_pl.ops.layout`), shape (K, entries).
        right: Their packed right factors, likewise.
        weights: w of each, shape (K, r).
        shapes: r shapes.
    """
    shapes = tuple(shapes)
    lefts = torch.split(left, left_sizes(shapes), 1)
    rights = torch.split(right, right_sizes(shapes), 1)
    stacked = []
    for shape, members in group_equal(shapes).items():
        m_a, n_a, m_b, n_b, identity = shape
        first = shape.costs[0] <= shape.costs[1]
        b = torch.stack([rights[i] for i in members], 1) * weights[:, members, None]
        b = b.view(len(right), -1, m_b, n_b)  # (K, C, m_b, n_b)
        if identity:
            a = torch.eye(m_a, dtype=right.dtype, device=right.device).expand(*b.shape[:2], -1, -1)
        else:
            a = torch.stack([lefts[i] for i in members], 1).view(len(right), -1, m_a, n_a)  # (K, C, m_a, n_a)
        if first:
            a, b = a.transpose(1, 2).flatten(1, 2), b.transpose(2, 3).flatten(1, 2)
        else:
            a, b = a.permute(0, 2, 3, 1).flatten(2), b.permute(0, 3, 1, 2).flatten(2)
        stacked.append(RowFactors(shape, first, a.contiguous(), b.contiguous()))
    return stacked


def rows_update(x: Tensor, stacked: Sequence[RowFactors], adapter: Tensor, m: int) -> Tensor:
    """Computes the update of each row by its own adapter, shape (N, T, m), in the wider of both dtypes.

    Args:
        x: Input, shape (N, T, n).
        stacked: The factors of K adapters.
        adapter: Which of them each row has, shape (N,).
        m: Output features.
    """
    x = x.to(torch.promote_types(x.dtype, stacked[0].right.dtype))
    rows, tokens, n = x.shape
    out = x.new_zeros(rows, tokens, m)
    for (m_a, n_a, m_b, n_b, _), left_first, lefts, rights in stacked:
        left, right = lefts[adapter].to(x.dtype), rights[adapter].to(x.dtype)  # of each row: (N, …)
        grid = F.pad(x, (0, n_a * n_b - n)).view(rows, tokens, n_a, n_b)  # a negative pad cuts
        if left_first:
            hidden = torch.bmm(left, _swapped(grid).view(rows, n_a, tokens * n_b))  # (N, m_a C, T n_b)
            hidden = hidden.view(rows, m_a, -1, tokens, n_b).permute(0, 3, 1, 2, 4)  # (N, T, m_a, C, n_b)
            product = torch.bmm(hidden.reshape(rows, tokens * m_a, -1), right)  # (N, T m_a, m_b)
            product = product.view(rows, tokens, m_a * m_b)
        else:
            hidden = torch.bmm(grid.view(rows, tokens * n_a, n_b), right)  # (N, T n_a, C m_b)
            hidden = hidden.view(rows, tokens, n_a * (hidden.shape[2] // m_b), m_b)  # (N, T, n_a C, m_b)
            product = torch.bmm(left, _swapped(hidden).view(rows, -1, tokens * m_b))  # (N, m_a, T m_b)
            product = _swapped(product.view(rows, m_a, tokens, m_b)).view(rows, tokens, m_a * m_b)
        out[..., : m_a * m_b] += product[..., :m]
    return out


def _swapped(x: Tensor) -> Tensor:
    """Exchanges the second and the third dimension; a copy unless one of them is 1."""
    return x.transpose(1, 2).contiguous()
