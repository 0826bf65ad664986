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

from moka_pl.ops.layout import ComponentIndex, Shape, group_equal, left_sizes, right_sizes, starts


class _Matrix(NamedTuple):
    """A matrix of (rows, columns) within a gathered vector, from entry ``start`` on."""

    rows: int
    columns: int
    start: int

    def of(self, gathered: Tensor) -> Tensor:
        """The matrix, (rows, columns)."""
        return gathered.as_strided((self.rows, self.columns), (self.columns, 1), self.start)

    def repeated(self, gathered: Tensor, times: int) -> Tensor:
        """The same matrix so many times, (times, rows, columns), without copies."""
        size = (times, self.rows, self.columns)
        return gathered.as_strided(size, (0, self.columns, 1), self.start)


class _Group(NamedTuple):
    """Components of one shape.

    Attributes:
        shape: Their shape.
        members: Their number C.
        left_first: Whether left factors come first.
        left: Their left factors as one matrix: (m_a C, n_a) where these come first, else (m_a, n_a C).
        right: Their right factors as one matrix: (C m_b, n_b), or (m_b, C n_b) where left ones come first.
    """

    shape: Shape
    members: int
    left_first: bool
    left: _Matrix
    right: _Matrix


class _Order(NamedTuple):
    """Where each gathered entry lies in the packed vector, and each packed one in the gathered vector."""

    gather: Tensor
    scatter: Tensor


class _Layout(NamedTuple):
    """All groups, the order of both sides, and the component of each packed right entry."""

    groups: tuple[_Group, ...]
    left: _Order
    right: _Order
    component_index: ComponentIndex


class Sides(NamedTuple):
    """Factors, the right ones times w, or gradients, both sides gathered."""

    left: Tensor
    right: Tensor


@cache
@torch.inference_mode(False)  # what an evaluation builds first serves training, too
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> _Layout:
    left_starts, right_starts = starts(left_sizes(shapes)), starts(right_sizes(shapes))
    groups, lefts, rights = [], [], []
    left_size = right_size = 0
    for s, members in group_equal(shapes).items():
        count, first = len(members), not s.identity and s.costs[0] <= s.costs[1]
        right = _entries(right_starts, members, s.m_b, s.n_b)  # (C, m_b, n_b)
        rights.append((right.transpose(0, 1) if first else right).flatten())
        left = _entries(left_starts, members, s.m_a, s.n_a)  # (C, m_a, n_a)
        left = left[:0] if s.identity else left
        lefts.append((left.transpose(0, 1) if first else left.permute(1, 2, 0)).flatten())
        if first:
            matrices = _Matrix(s.m_a * count, s.n_a, left_size), _Matrix(s.m_b, count * s.n_b, right_size)
        else:
            matrices = _Matrix(s.m_a, s.n_a * count, left_size), _Matrix(count * s.m_b, s.n_b, right_size)
        groups.append(_Group(s, count, first, *matrices))
        left_size, right_size = left_size + len(lefts[-1]), right_size + len(rights[-1])
    left_order, right_order = (
        _Order(gather.to(device), gather.argsort().to(device))
        for gather in (torch.cat(lefts), torch.cat(rights))
    )
    index = ComponentIndex.of_sizes(right_sizes(shapes), device)
    return _Layout(tuple(groups), left_order, right_order, index)


def _entries(begins: list[int], members: list[int], rows: int, columns: int) -> Tensor:
    """Where the entries of some components' factors lie in the packed vector, (C, rows, columns)."""
    first = torch.tensor([begins[i] for i in members]).view(-1, 1, 1)
    return first + torch.arange(rows * columns).view(rows, columns)


def gather(left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]) -> Sides:
    """Gathers the factors as the products take them, the right ones times w.

    Args:
        left: Packed left factors.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.
    """
    layout = _layout(shapes, right.device)
    scaled = layout.component_index.scale(right, weights)
    return Sides(left.index_select(0, layout.left.gather), scaled.index_select(0, layout.right.gather))


def add_update_(out: Tensor, x: Tensor, factors: Sides, shapes: tuple[Shape, ...]) -> Tensor:
    """Adds ``Σ_i w_i (A_i ⊗ B_i) x`` to ``out`` and returns that, all in one dtype.

    Args:
        out: What is changed in place, shape (m, T), contiguous.
        x: Input, tokens in columns, shape (n, T), contiguous.
        factors: The gathered factors.
        shapes: r shapes.
    """
    (n, tokens), m = x.shape, out.shape[0]
    layout = _layout(shapes, x.device)
    left, right = factors
    for (m_a, n_a, m_b, n_b, identity), members, left_first, lefts, rights in layout.groups:
        rows, columns = m_a * m_b, n_a * n_b
        grid = x if columns == n else _fit(x, columns)  # (n_a n_b, T)
        total = out if rows == m else out.new_zeros(rows, tokens)  # (m_a m_b, T)
        if left_first:
            hidden = torch.mm(lefts.of(left), grid.view(n_a, n_b * tokens))  # (m_a C, n_b T)
            hidden = hidden.view(m_a, members * n_b, tokens)
            total.view(m_a, m_b, tokens).baddbmm_(rights.repeated(right, m_a), hidden)
        elif identity:
            b = _shared(rights.of(right), members)  # (m_b, n_b)
            total.view(m_a, m_b, tokens).baddbmm_(b.expand(m_a, -1, -1), grid.view(n_a, n_b, tokens))
        else:
            hidden = torch.bmm(rights.repeated(right, n_a), grid.view(n_a, n_b, tokens))  # (n_a, C m_b, T)
            hidden = hidden.view(n_a * members, m_b * tokens)
            total.view(m_a, m_b * tokens).addmm_(lefts.of(left), hidden)
        if rows != m:
            out[:rows] += total[:m]
    return out


def update_backward(
    grad: Tensor,
    x: Tensor,
    right: Tensor,
    weights: Tensor,
    factors: Sides,
    shapes: tuple[Shape, ...],
    grad_x: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of left factors, ``right`` and ``weights`` in :func:`add_update_`.

    With X and G of one token as matrices: ``dA = w Σ_t G B Xᵀ``, ``dB = w Σ_t Gᵀ A X``, ``dX = w Aᵀ G B``,
    and since the product is linear in B, ``dw_i = <dB_i / w_i, B_i>`` needs no second forward.

    Args:
        grad: Gradient of the sum, shape (m, T), contiguous.
        x: Its input, shape (n, T), contiguous.
        right: Packed right factors.
        weights: w, shape (r,).
        factors: The gathered factors.
        shapes: r shapes.
        grad_x: What to add the gradient of ``x`` to, shape (n, T), contiguous; None where nobody needs it.
    """
    (n, tokens), m = x.shape, grad.shape[0]
    layout = _layout(shapes, x.device)
    grads = Sides(torch.empty_like(factors.left), torch.empty_like(factors.right))
    for group in layout.groups:
        m_a, n_a, m_b, n_b, identity = group.shape
        rows, columns = m_a * m_b, n_a * n_b
        grid = x if columns == n else _fit(x, columns)  # (n_a n_b, T)
        out = (grad if rows == m else _fit(grad, rows)).view(m_a, m_b, tokens)
        to_x = grad_x if grad_x is None or columns == n else grad_x.new_zeros(columns, tokens)
        if group.left_first:
            _left_first_backward(group, out, grid, factors, grads, to_x)
        elif identity:
            _identity_backward(group, out, grid, factors, grads, to_x)
        else:
            _right_first_backward(group, out, grid, factors, grads, to_x)
        if grad_x is not None and to_x is not None and columns != n:
            grad_x[:columns] += to_x[:n]
    # The left factors' gradients hold w already, through the scaled right factors.
    grad_left = grads.left.index_select(0, layout.left.scatter)
    grad_right = grads.right.index_select(0, layout.right.scatter)
    grad_weights = layout.component_index.sums(grad_right * right, len(shapes))
    return grad_left, layout.component_index.scale(grad_right, weights), grad_weights


def _left_first_backward(
    group: _Group, grad: Tensor, grid: Tensor, factors: Sides, grads: Sides, to_x: Tensor | None
) -> None:
    """Puts into ``grads`` what ∂L/∂(its sum), (m_a, m_b, T), and its input, (n_a n_b, T), give for a group.

    Left factors come first here. The right ones hold w already. ``to_x``: what to add ∂L/∂input to, or None.
    """
    (m_a, n_a, _, n_b, _), members, _, lefts, rights = group
    tokens = grid.shape[1]
    grid = grid.view(n_a, n_b * tokens)
    a = lefts.of(factors.left)  # (m_a C, n_a)
    back = torch.bmm(rights.repeated(factors.right, m_a).mT, grad)  # (m_a, C n_b, T)
    back = back.view(m_a * members, n_b * tokens)
    torch.mm(back, grid.mT, out=lefts.of(grads.left))
    if to_x is not None:
        to_x.view(n_a, n_b * tokens).addmm_(a.mT, back)
    hidden = torch.mm(a, grid).view(m_a, members * n_b, tokens)
    torch.sum(torch.bmm(grad, hidden.mT), 0, out=rights.of(grads.right))


def _identity_backward(
    group: _Group, grad: Tensor, grid: Tensor, factors: Sides, grads: Sides, to_x: Tensor | None
) -> None:
    """As :func:`_left_first_backward`, with identities on the left."""
    (_, n_a, m_b, n_b, _), members, _, _, rights = group
    grid = grid.view(n_a, n_b, -1)  # (n_a, n_b, T)
    shared = torch.bmm(grad, grid.mT).sum(0)  # (m_b, n_b)
    rights.of(grads.right).view(members, m_b, n_b).copy_(shared)
    if to_x is not None:
        b = _shared(rights.of(factors.right), members)  # (m_b, n_b)
        to_x.view(n_a, n_b, -1).baddbmm_(b.mT.expand(n_a, -1, -1), grad)


def _right_first_backward(
    group: _Group, grad: Tensor, grid: Tensor, factors: Sides, grads: Sides, to_x: Tensor | None
) -> None:
    """As :func:`_left_first_backward`, with right factors first."""
    (m_a, n_a, m_b, n_b, _), members, _, lefts, rights = group
    tokens = grid.shape[1]
    grid = grid.view(n_a, n_b, tokens)
    b = rights.repeated(factors.right, n_a)  # (n_a, C m_b, n_b)
    grad = grad.view(m_a, m_b * tokens)
    back = torch.mm(lefts.of(factors.left).mT, grad).view(n_a, members * m_b, tokens)
    torch.sum(torch.bmm(back, grid.mT), 0, out=rights.of(grads.right))
    if to_x is not None:
        to_x.view(n_a, n_b, tokens).baddbmm_(b.mT, back)
    hidden = torch.bmm(b, grid).view(n_a * members, m_b * tokens)
    torch.mm(grad, hidden.mT, out=lefts.of(grads.left))


def transposed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns tokens in rows as columns, (T, n) to (n, T), or the reverse: contiguous, in ``dtype``."""
    return x.to(dtype).mT.contiguous()


def _fit(x: Tensor, rows: int) -> Tensor:
    """Cuts or zero-fills x of (n, T) to (rows, T)."""
    return F.pad(x, (0, 0, 0, rows - len(x)))  # a negative pad cuts


def _shared(b: Tensor, members: int) -> Tensor:
    """The sum of C right factors on top of each other, (m_b, n_b): identities of one size share blocks."""
    return b.view(members, len(b) // members, b.shape[1]).sum(0)
