"""``Σ_i w_i (A_i ⊗ B_i) x`` by products with the small factors: no m × n matrix is formed.

Tokens lie in columns here: x is (n, T), which is also n_a blocks of (n_b, T). A left factor then mixes the
blocks, which is one matrix product whatever T is, and a right factor maps each block, a batch of n_a or m_a
products. Which of the two comes first is what costs less.

Components of one shape share these products: the step that comes first yields all their results side by
side, and the second adds them up. Factors are gathered into the order of rows and columns that this takes.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import Owners, Shape, group_equal, left_sizes, right_sizes, starts


class _Place(NamedTuple):
    """Where a matrix lies in a gathered vector."""

    rows: int
    columns: int
    at: int

    def of(self, gathered: Tensor) -> Tensor:
        """The matrix, (rows, columns)."""
        return gathered.as_strided((self.rows, self.columns), (self.columns, 1), self.at)

    def repeated(self, gathered: Tensor, times: int) -> Tensor:
        """The same matrix so many times, (times, rows, columns), without copies."""
        size = (times, self.rows, self.columns)
        return gathered.as_strided(size, (0, self.columns, 1), self.at)


class _Group(NamedTuple):
    """Components of one shape.

    Attributes:
        shape: Their shape.
        members: Their number C.
        mixes_first: Whether left factors come first.
        left: Their left factors as one matrix: (m_a C, n_a) where these come first, else (m_a, n_a C).
        right: Their right factors as one matrix: (C m_b, n_b), or (m_b, C n_b) where left ones come first.
    """

    shape: Shape
    members: int
    mixes_first: bool
    left: _Place
    right: _Place


class _Side(NamedTuple):
    """The order in which one side's entries are gathered, and the way back.

    Attributes:
        order: Where each gathered entry lies in the packed vector.
        back: Where each packed entry lies in the gathered vector.
    """

    order: Tensor
    back: Tensor


class _Layout(NamedTuple):
    """All groups, the order of both sides, and the owners of packed right entries."""

    groups: tuple[_Group, ...]
    left: _Side
    right: _Side
    owners: Owners


def mixes_first(shape: Shape) -> bool:
    """Whether (A X) Bᵀ takes fewer multiply-adds than A (X Bᵀ)."""
    left = shape.m_a * shape.n_b * (shape.n_a + shape.m_b)
    right = shape.n_a * shape.m_b * (shape.n_b + shape.m_a)
    return left <= right


@cache
@torch.inference_mode(False)  # what an evaluation builds first serves training, too
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> _Layout:
    left_starts, right_starts = starts(left_sizes(shapes)), starts(right_sizes(shapes))
    groups, lefts, rights = [], [], []
    left_at = right_at = 0
    for s, members in group_equal(shapes).items():
        count, first = len(members), mixes_first(s) and not s.identity
        at = torch.tensor([right_starts[i] for i in members]).view(-1, 1, 1)
        right = at + torch.arange(s.m_b * s.n_b).view(s.m_b, s.n_b)  # (C, m_b, n_b)
        rights.append((right.transpose(0, 1) if first else right).flatten())
        at = torch.tensor([left_starts[i] for i in members]).view(-1, 1, 1)
        left = at + torch.arange(s.m_a * s.n_a).view(s.m_a, s.n_a)  # (C, m_a, n_a)
        left = left[:0] if s.identity else left
        lefts.append((left.transpose(0, 1) if first else left.permute(1, 2, 0)).flatten())
        if first:
            places = _Place(s.m_a * count, s.n_a, left_at), _Place(s.m_b, count * s.n_b, right_at)
        else:
            places = _Place(s.m_a, s.n_a * count, left_at), _Place(count * s.m_b, s.n_b, right_at)
        groups.append(_Group(s, count, first, *places))
        left_at, right_at = left_at + len(lefts[-1]), right_at + len(rights[-1])
    left_side, right_side = (
        _Side(order.to(device), order.argsort().to(device)) for order in (torch.cat(lefts), torch.cat(rights))
    )
    return _Layout(tuple(groups), left_side, right_side, Owners.of_sizes(right_sizes(shapes), device))


def add_update_(
    out: Tensor, x: Tensor, left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> Tensor:
    """Adds ``Σ_i w_i (A_i ⊗ B_i) x`` in place, all in one dtype.

    Args:
        out: What to add to, shape (m, T), contiguous.
        x: Input, tokens in columns, shape (n, T), contiguous.
        left: Packed left factors.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.

    Returns:
        ``out``.
    """
    (n, tokens), m = x.shape, out.shape[0]
    layout = _layout(shapes, x.device)
    left = left.index_select(0, layout.left.order)
    right = layout.owners.scale(right, weights).index_select(0, layout.right.order)
    for (m_a, n_a, m_b, n_b, identity), members, first, at_left, at_right in layout.groups:
        rows, columns = m_a * m_b, n_a * n_b
        grid = x if columns == n else _fit(x, columns)
        total = out if rows == m else out.new_zeros(rows, tokens)
        if first:
            hidden = torch.mm(at_left.of(left), grid.view(n_a, n_b * tokens))
            hidden = hidden.view(m_a, members * n_b, tokens)
            total.view(m_a, m_b, tokens).baddbmm_(at_right.repeated(right, m_a), hidden)
        elif identity:
            b = _shared(at_right.of(right), members)
            total.view(m_a, m_b, tokens).baddbmm_(b.expand(m_a, -1, -1), grid.view(n_a, n_b, tokens))
        else:
            hidden = torch.bmm(at_right.repeated(right, n_a), grid.view(n_a, n_b, tokens))
            hidden = hidden.view(n_a * members, m_b * tokens)
            total.view(m_a, m_b * tokens).addmm_(at_left.of(left), hidden)
        if rows != m:
            out[:rows] += total[:m]
    return out


def pull_back(
    grad: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    weights: Tensor,
    shapes: tuple[Shape, ...],
    grad_x: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of :func:`add_update_`.

    With X and G of one token as matrices: ``dA = w Σ_t G B Xᵀ``, ``dB = w Σ_t Gᵀ A X``, ``dX = w Aᵀ G B``,
    and since the product is linear in B, ``dw_i = <dB_i / w_i, B_i>`` needs no second forward.

    Args:
        grad: Gradient of the sum, shape (m, T), contiguous.
        x: Its input, shape (n, T), contiguous.
        left: Packed left factors.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.
        grad_x: What to add the gradient of ``x`` to, shape (n, T), contiguous; None where nobody needs it.

    Returns:
        Gradients of ``left``, ``right`` and ``weights``.
    """
    (n, tokens), m = x.shape, grad.shape[0]
    layout = _layout(shapes, x.device)
    gathered = left.index_select(0, layout.left.order)
    scaled = layout.owners.scale(right, weights).index_select(0, layout.right.order)
    grad_left, grad_right = torch.empty_like(gathered), torch.empty_like(scaled)
    for (m_a, n_a, m_b, n_b, identity), members, first, at_left, at_right in layout.groups:
        rows, columns = m_a * m_b, n_a * n_b
        grid = x if columns == n else _fit(x, columns)
        out = (grad if rows == m else _fit(grad, rows)).view(m_a, m_b, tokens)
        to_x = grad_x if grad_x is None or columns == n else grad_x.new_zeros(columns, tokens)
        if first:
            grid = grid.view(n_a, n_b * tokens)
            a = at_left.of(gathered)
            back = torch.bmm(at_right.repeated(scaled, m_a).mT, out).view(m_a * members, n_b * tokens)
            torch.mm(back, grid.mT, out=at_left.of(grad_left))
            if to_x is not None:
                to_x.view(n_a, n_b * tokens).addmm_(a.mT, back)
            hidden = torch.mm(a, grid).view(m_a, members * n_b, tokens)
            torch.sum(torch.bmm(out, hidden.mT), 0, out=at_right.of(grad_right))
        elif identity:
            grid = grid.view(n_a, n_b, tokens)
            shared = torch.bmm(out, grid.mT).sum(0)  # (m_b, n_b)
            at_right.of(grad_right).view(members, m_b, n_b).copy_(shared)
            if to_x is not None:
                b = _shared(at_right.of(scaled), members)
                to_x.view(n_a, n_b, tokens).baddbmm_(b.mT.expand(n_a, -1, -1), out)
        else:
            grid = grid.view(n_a, n_b, tokens)
            b = at_right.repeated(scaled, n_a)
            out = out.view(m_a, m_b * tokens)
            back = torch.mm(at_left.of(gathered).mT, out).view(n_a, members * m_b, tokens)
            torch.sum(torch.bmm(back, grid.mT), 0, out=at_right.of(grad_right))
            if to_x is not None:
                to_x.view(n_a, n_b, tokens).baddbmm_(b.mT, back)
            hidden = torch.bmm(b, grid).view(n_a * members, m_b * tokens)
            torch.mm(out, hidden.mT, out=at_left.of(grad_left))
        if grad_x is not None and to_x is not None and columns != n:
            grad_x[:columns] += to_x[:n]
    # The left factors' gradients hold w already, through the scaled right factors.
    grad_left = grad_left.index_select(0, layout.left.back)
    grad_right = grad_right.index_select(0, layout.right.back)
    grad_weights = layout.owners.sums(grad_right * right, len(shapes))
    return grad_left, layout.owners.scale(grad_right, weights), grad_weights


def turned(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Tokens in rows as columns, or the other way round: the transposed matrix, contiguous, in ``dtype``."""
    return x.to(dtype).mT.contiguous()


def _fit(x: Tensor, rows: int) -> Tensor:
    """Cuts or zero-fills x to so many rows."""
    return F.pad(x, (0, 0, 0, rows - len(x)))  # a negative pad cuts


def _shared(b: Tensor, members: int) -> Tensor:
    """The sum of C right factors on top of each other, (m_b, n_b): identities of one size share blocks."""
    return b.view(members, len(b) // members, b.shape[1]).sum(0)
