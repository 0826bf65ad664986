"""``Σ_i w_i (A_i ⊗ B_i) x`` with an adapter of its own for each row of a batch, in a few batched products.

With X of one token as n_a × n_b, ``Y = A X Bᵀ``. The products are batched over the rows, so that there are
as many as for one adapter, however many adapters a batch has. Components of one shape share them, side by
side, as in :mod:`moka_pl.ops.structured`; the second product adds itself to those of the shapes before.

A small batch on a GPU takes the time of its launches and not of its numbers. With one token a row a shape
takes two, and with more four: what lies between the products is then put in order. The factors of the rows
lie side by side, those of all shapes in one matrix.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import Shape, group_equal, left_sizes, right_sizes

#: Bytes that a GPU moves while a launch is called. The host needs about 15 µs for one.
_LAUNCH = 30e6


class _Group(NamedTuple):
    """C components of one shape, whose factors lie side by side in a row of stacked factors.

    The left ones, as (m_a C, n_a) where these come first, else as (m_a, n_a C), are followed by the right
    ones with their weights, as (C n_b, m_b) where left ones come first, else as (n_b, C m_b). Of identities
    there are only right ones, added up, (n_b, m_b).

    Attributes:
        shape: Their shape.
        members: Which components they are.
        left_first: Whether left factors come first, which is what costs less.
    """

    shape: Shape
    members: tuple[int, ...]
    left_first: bool


@cache
def _groups(shapes: tuple[Shape, ...], m: int) -> tuple[_Group, ...]:
    """All groups; one that fills the output, m numbers, is the first if there is one."""
    return tuple(
        _Group(shape, tuple(members), not shape.identity and shape.costs[0] <= shape.costs[1])
        for shape, members in sorted(group_equal(shapes).items(), key=lambda pair: pair[0].rows != m)
    )


@cache
def _part_sizes(shapes: tuple[Shape, ...], m: int) -> list[int]:
    """Entries of the left factors of each group and of the right ones, in turn."""
    sizes = []
    for (m_a, n_a, m_b, n_b, identity), members, _ in _groups(shapes, m):
        sizes += [0, m_b * n_b] if identity else [len(members) * m_a * n_a, len(members) * m_b * n_b]
    return sizes


def stack_factors(left: Tensor, right: Tensor, weights: Tensor, shapes: Sequence[Shape], m: int) -> Tensor:
    """Prepares the factors of K adapters with the same shapes for :func:`rows_update`, shape (K, entries).

    Args:
        left: Their packed left factors (see :mod:`moka_pl.ops.layout`), shape (K, entries).
        right: Their packed right factors, likewise.
        weights: w of each, shape (K, r).
        shapes: r shapes.
        m: Output features.
    """
    shapes = tuple(shapes)
    lefts = torch.split(left, left_sizes(shapes), 1)
    rights = torch.split(right, right_sizes(shapes), 1)
    parts = []
    for (m_a, n_a, m_b, n_b, identity), members, left_first in _groups(shapes, m):
        b = torch.stack([rights[i] for i in members], 1) * weights[:, members, None]
        b = b.view(len(right), -1, m_b, n_b)  # (K, C, m_b, n_b)
        if identity:
            parts.append(b.sum(1).mT.flatten(1))  # (K, n_b m_b)
            continue
        a = torch.stack([lefts[i] for i in members], 1).view(len(right), -1, m_a, n_a)  # (K, C, m_a, n_a)
        if left_first:
            a, b = a.transpose(1, 2), b.transpose(2, 3)  # (K, m_a, C, n_a), (K, C, n_b, m_b)
        else:
            a, b = a.permute(0, 2, 3, 1), b.permute(0, 3, 1, 2)  # (K, m_a, n_a, C), (K, n_b, C, m_b)
        parts += [a.flatten(1), b.flatten(1)]
    return torch.cat(parts, 1)


def rows_update(
    x: Tensor, factors: Tensor, shapes: tuple[Shape, ...], m: int, out: Tensor | None = None
) -> Tensor:
    """Computes the update of each row by its own adapter, shape (N, T, m), in the dtype of x.

    Args:
        x: Input, shape (N, T, n).
        factors: Those of each row's adapter, of :func:`stack_factors`, shape (N, entries), in the dtype of x.
        shapes: Their r shapes.
        m: Output features.
        out: What the update is added to, in place, and returned: contiguous, of the update's shape and dtype.
    """
    rows, tokens, n = x.shape
    x = x.contiguous()
    groups = _groups(shapes, m)
    parts = torch.split(factors, _part_sizes(shapes, m), 1)
    begun = out is not None
    if out is None:
        begun = groups[0].shape.rows != m
        out = x.new_zeros(rows, tokens, m) if begun else x.new_empty(rows, tokens, m)
    for k, group in enumerate(groups):
        cols = group.shape.cols
        grid = x if cols == n else F.pad(x, (0, cols - n))  # a negative pad cuts
        _add_group_(out, grid, parts[2 * k], parts[2 * k + 1], group, keeps=k > 0 or begun)
    return out


def rounds_once(shapes: tuple[Shape, ...], m: int) -> bool:
    """Whether :func:`rows_update` adds to its ``out`` once, in one product, and so rounds it once.

    Args:
        shapes: r shapes.
        m: Output features.
    """
    first, *others = _groups(shapes, m)
    return not others and first.shape.rows == m and (first.left_first or first.shape.identity)


def alike(shapes: tuple[Shape, ...], m: int) -> bool:
    """Whether the factors of :func:`stack_factors` are those of one shape, left ones first.

    Args:
        shapes: r shapes.
        m: Output features.
    """
    first, *others = _groups(shapes, m)
    return first.left_first and not others


@cache
def batched_cost(shapes: tuple[Shape, ...], m: int, n: int, token_bytes: int) -> float:
    """Estimates the time of :func:`rows_update` with many tokens on a GPU, in bytes moved meanwhile.

    Args:
        shapes: r shapes.
        m: Output features.
        n: Input features.
        token_bytes: Tokens of all rows, times the bytes of a number.
    """
    groups = _groups(shapes, m)
    hidden = (g.shape.m_a * g.shape.n_b if g.left_first else g.shape.n_a * g.shape.m_b for g in groups)
    numbers = sum(2 * n + 3 * m + 4 * len(g.members) * h for g, h in zip(groups, hidden, strict=True))
    return token_bytes * numbers + (4 * len(groups) + 1) * _LAUNCH


def merged_cost(adapters: int, m: int, n: int, tokens: int, itemsize: int, launches: int) -> float:
    """Estimates, in the same unit, how much longer W + ΔW of each adapter takes than W for all rows.

    Args:
        adapters: Their number.
        m: Output features.
        n: Input features.
        tokens: Tokens of all rows.
        itemsize: Bytes of a number.
        launches: What is called.
    """
    return 2 * itemsize * (adapters * m * n + tokens * (m + n)) + launches * _LAUNCH


def _add_group_(out: Tensor, x: Tensor, lefts: Tensor, rights: Tensor, group: _Group, keeps: bool) -> None:
    """Adds the components of one shape to the output, (N, T, m); what is in there counts if ``keeps``.

    Args:
        out: The output.
        x: Input, (N, T, n_a n_b).
        lefts: The left factors of the rows, (N, entries).
        rights: The right factors of the rows, likewise.
        group: The components.
        keeps: Whether they are added to what is there, or stand in its place.
    """
    (m_a, n_a, m_b, n_b, identity), _, left_first = group
    rows, tokens, m = out.shape
    by_token = True  # else tokens are columns
    if identity:
        left, right = x.reshape(rows, tokens * n_a, n_b), rights.view(rows, n_b, m_b)
    elif left_first:
        grid = _swapped(x, tokens, n_a, n_b).view(rows, n_a, tokens * n_b)
        hidden = torch.bmm(lefts.view(rows, -1, n_a), grid)  # (N, m_a C, T n_b)
        if tokens > 1:
            hidden = hidden.view(rows, m_a, -1, tokens, n_b).permute(0, 3, 1, 2, 4)  # (N, T, m_a, C, n_b)
        left, right = hidden.reshape(rows, tokens * m_a, -1), rights.view(rows, -1, m_b)
    else:
        by_token = tokens == 1
        hidden = x.reshape(rows, tokens * n_a, n_b)
        hidden = torch.bmm(hidden, rights.view(rows, n_b, -1))  # (N, T n_a, C m_b)
        hidden = _swapped(hidden, tokens, -1, m_b)  # (N, n_a C, T, m_b)
        left, right = lefts.view(rows, m_a, -1), hidden.view(rows, -1, tokens * m_b)
    fits = group.shape.rows == m
    if by_token and fits:
        out.view(rows, -1, m_b).baddbmm_(left, right, beta=int(keeps))
        return
    product = torch.bmm(left, right)  # (N, T m_a, m_b) or (N, m_a, T m_b)
    if not by_token:
        product = product.view(rows, m_a, tokens, m_b).transpose(1, 2)  # (N, T, m_a, m_b)
    if fits:
        whole = out.view(rows, tokens, m_a, m_b)
        whole.add_(product) if keeps else whole.copy_(product)
    else:
        out[..., : group.shape.rows] += product.reshape(rows, tokens, -1)[..., :m]


def _swapped(x: Tensor, tokens: int, outer: int, inner: int) -> Tensor:
    """Views numbers of a token as (outer, inner) and puts outer before the tokens: a copy unless T is 1."""
    return x if tokens == 1 else x.view(len(x), tokens, outer, inner).transpose(1, 2).contiguous()
