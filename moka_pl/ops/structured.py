"""``Σ_i w_i (A_i ⊗ B_i) x`` by products with the small factors: no m × n matrix is formed.

Tokens lie in columns here: x is (n, T), which is also n_a blocks of (n_b, T). A left factor then mixes the
blocks, which is one matrix product whatever T is, and a right factor maps each block, a batch of n_a or m_a
products. Which of the two comes first is what costs less.

Components of one shape share these products: the step that comes first yields all their results side by
side, and the second adds them up. Factors are gathered into the order of rows and columns that this takes.

For few tokens the calls take as long as the products. So inputs, factors and intermediates lie in buffers
that layers of one size share, with views of them made once (:mod:`moka_pl.ops.workspaces`).
"""

from abc import ABC, abstractmethod
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.ops.layout import ComponentIndex, Shape, group_equal, left_sizes, right_sizes, starts
from moka_pl.ops.workspaces import Workspaces


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

    @property
    def hidden(self) -> int:
        """Numbers that the first step makes of a token."""
        s = self.shape
        return self.members * (s.m_a * s.n_b if self.left_first else s.n_a * s.m_b)

    @property
    def sums(self) -> int:
        """Numbers that are summed up to the right factors' gradient."""
        s = self.shape
        return self.members * s.m_b * s.n_b * (s.m_a if self.left_first else s.n_a)


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


class _Buffers(NamedTuple):
    """Where all groups compute: tokens lie in columns.

    Attributes:
        x: Input, (n, T), or as a group's factors have it.
        out: Output or its gradient, (m, T), likewise.
        to_x: Gradient of the input, (n, T), likewise.
        factors: The gathered factors.
        grads: Their gradients.
        hidden: What the first step makes, of all groups the largest, flat.
        back: Its gradient, likewise.
        sums: What is summed up to a gradient, likewise.
    """

    x: Tensor
    out: Tensor
    to_x: Tensor
    factors: Sides
    grads: Sides
    hidden: Tensor
    back: Tensor
    sums: Tensor


class _Products(ABC):
    """The products of one group, all of them between views of the same buffers.

    Args:
        group: The group.
        buffers: The buffers, of sizes that fit the group.
    """

    def __init__(self, group: _Group, buffers: _Buffers) -> None:
        self.group = group
        self.x, self.out, self.to_x = buffers.x, buffers.out, buffers.to_x
        self.b, self.grad_b = (group.right.of(side.right) for side in (buffers.factors, buffers.grads))

    @abstractmethod
    def add_(self) -> None:
        """Adds the group's update of the input to the output."""

    @abstractmethod
    def backward(self, needs_x: bool) -> None:
        """Computes the gradients of the factors, and adds that of the input to it where it is needed."""


class _Steps(_Products):
    """Products in two steps, which mix blocks of rows and map within blocks, in one order or the other."""

    def __init__(self, group: _Group, buffers: _Buffers) -> None:
        super().__init__(group, buffers)
        self.a, self.grad_a = (group.left.of(side.left) for side in (buffers.factors, buffers.grads))
        (m_a, n_a, m_b, n_b, _), tokens = group.shape, self.x.shape[1]
        blocks, rows = (m_a, n_b) if group.left_first else (n_a, m_b)  # of what lies between the steps
        self.rights = group.right.repeated(buffers.factors.right, blocks)
        size = (blocks * group.members, rows * tokens)
        self.hidden, self.back = _matrix(buffers.hidden, *size), _matrix(buffers.back, *size)
        self.hidden_blocks, self.back_blocks = (
            part.view(blocks, group.members * rows, tokens) for part in (self.hidden, self.back)
        )
        self.sums = buffers.sums[: group.sums].view(blocks, *self.rights.shape[1:])


class _LeftFirst(_Steps):
    """Left factors come first: they mix blocks of rows, and right ones add these up."""

    def __init__(self, group: _Group, buffers: _Buffers) -> None:
        super().__init__(group, buffers)
        m_a, n_a, m_b, *_ = group.shape
        self.grid, self.to_grid = self.x.view(n_a, -1), self.to_x.view(n_a, -1)  # (n_a, n_b T)
        self.blocks = self.out.view(m_a, m_b, -1)
        self.turned = self.a.mT, self.rights.mT, self.grid.mT, self.hidden_blocks.mT

    def add_(self) -> None:
        torch.mm(self.a, self.grid, out=self.hidden)
        self.blocks.baddbmm_(self.rights, self.hidden_blocks)

    def backward(self, needs_x: bool) -> None:
        a_t, rights_t, grid_t, hidden_t = self.turned
        torch.bmm(rights_t, self.blocks, out=self.back_blocks)
        torch.mm(self.back, grid_t, out=self.grad_a)
        if needs_x:
            self.to_grid.addmm_(a_t, self.back)
        torch.mm(self.a, self.grid, out=self.hidden)
        torch.bmm(self.blocks, hidden_t, out=self.sums)
        torch.sum(self.sums, 0, out=self.grad_b)


class _RightFirst(_Steps):
    """Right factors come first: they map each block of rows, and left ones mix the results."""

    def __init__(self, group: _Group, buffers: _Buffers) -> None:
        super().__init__(group, buffers)
        m_a, n_a, _, n_b, _ = group.shape
        self.grid, self.to_grid = (part.view(n_a, n_b, -1) for part in (self.x, self.to_x))
        self.blocks = self.out.view(m_a, -1)  # (m_a, m_b T)
        self.turned = self.a.mT, self.rights.mT, self.grid.mT, self.hidden.mT

    def add_(self) -> None:
        torch.bmm(self.rights, self.grid, out=self.hidden_blocks)
        self.blocks.addmm_(self.a, self.hidden)

    def backward(self, needs_x: bool) -> None:
        a_t, rights_t, grid_t, hidden_t = self.turned
        torch.mm(a_t, self.blocks, out=self.back)
        torch.bmm(self.back_blocks, grid_t, out=self.sums)
        torch.sum(self.sums, 0, out=self.grad_b)
        if needs_x:
            self.to_grid.baddbmm_(rights_t, self.back_blocks)
        torch.bmm(self.rights, self.grid, out=self.hidden_blocks)
        torch.mm(self.blocks, hidden_t, out=self.grad_a)


class _Identities(_Products):
    """Identities on the left: their right factors share blocks."""

    def __init__(self, group: _Group, buffers: _Buffers) -> None:
        super().__init__(group, buffers)
        _, k, m_b, n_b, _ = group.shape
        self.grid, self.to_grid = (part.view(k, n_b, -1) for part in (self.x, self.to_x))
        self.blocks = self.out.view(k, m_b, -1)
        self.rights = self.b.view(-1, m_b, n_b)  # (C, m_b, n_b)
        self.grad_rights = self.grad_b.view(-1, m_b, n_b)

    def add_(self) -> None:
        self.blocks.baddbmm_(self.rights.sum(0).expand(len(self.grid), -1, -1), self.grid)

    def backward(self, needs_x: bool) -> None:
        self.grad_rights.copy_(torch.bmm(self.blocks, self.grid.mT).sum(0))
        if needs_x:
            self.to_grid.baddbmm_(self.rights.sum(0).mT.expand(len(self.grid), -1, -1), self.blocks)


class _Padded(_Products):
    """The products of a group that does not fit the layer, in buffers of its own."""

    def __init__(self, group: _Group, buffers: _Buffers) -> None:
        super().__init__(group, buffers)
        rows, columns, tokens = group.shape.rows, group.shape.cols, self.x.shape[1]
        x, out, to_x = (self.x.new_zeros(size, tokens) for size in (columns, rows, columns))
        self.inner = _products(group, buffers._replace(x=x, out=out, to_x=to_x))

    def add_(self) -> None:
        _fit_(self.inner.x, self.x)
        self.inner.out.zero_()
        self.inner.add_()
        rows = len(self.inner.out)
        self.out[:rows] += self.inner.out[: len(self.out)]

    def backward(self, needs_x: bool) -> None:
        _fit_(self.inner.x, self.x)
        _fit_(self.inner.out, self.out)
        self.inner.to_x.zero_()
        self.inner.backward(needs_x)
        if needs_x:
            self.to_x[: len(self.inner.to_x)] += self.inner.to_x[: len(self.to_x)]


def _products(group: _Group, buffers: _Buffers) -> _Products:
    """The products of a group."""
    shape = group.shape
    if (shape.rows, shape.cols) != (len(buffers.out), len(buffers.x)):
        return _Padded(group, buffers)
    if shape.identity:
        return _Identities(group, buffers)
    return (_LeftFirst if group.left_first else _RightFirst)(group, buffers)


class StructuredProducts:
    """The products of a layer's size and number of tokens, and the buffers of their operands.

    Args:
        shapes: r shapes.
        m: Output features.
        n: Input features.
        tokens: T.
        like: Tensor of their dtype and device.

    Attributes:
        x: Input, tokens in columns, (n, T).
        out: Output, or its gradient, (m, T).
        to_x: Gradient of the input, (n, T).
        entries: Numbers that its large buffers hold.
    """

    def __init__(self, shapes: tuple[Shape, ...], m: int, n: int, tokens: int, like: Tensor) -> None:
        self._layout = _layout(shapes, like.device)
        self.x, self.out, self.to_x = (like.new_empty(size, tokens) for size in (n, m, n))
        sizes = len(self._layout.left.gather), len(self._layout.right.gather)
        self._factors, self._grads = (Sides(*map(like.new_empty, sizes)) for _ in range(2))
        hidden = tokens * max(group.hidden for group in self._layout.groups)
        inner = hidden, hidden, max(group.sums for group in self._layout.groups)
        buffers = _Buffers(
            self.x, self.out, self.to_x, self._factors, self._grads, *map(like.new_empty, inner)
        )
        self._products = [_products(group, buffers) for group in self._layout.groups]
        self.entries = tokens * (m + 2 * n) + sum(inner)

    def add_update_(self, factors: Sides) -> None:
        """Adds ``Σ_i w_i (A_i ⊗ B_i) x`` to the output.

        Args:
            factors: The gathered factors.
        """
        self._take(factors)
        for products in self._products:
            products.add_()

    def backward(
        self, right: Tensor, weights: Tensor, factors: Sides, needs_x: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns the gradients of left factors, ``right`` and ``weights`` in :meth:`add_update_`.

        With X and G of one token as matrices: ``dA = w Σ_t G B Xᵀ``, ``dB = w Σ_t Gᵀ A X``,
        ``dX = w Aᵀ G B``, and since the product is linear in B, ``dw_i = <dB_i / w_i, B_i>`` needs no second
        forward.

        Args:
            right: Packed right factors.
            weights: w, shape (r,).
            factors: The gathered factors.
            needs_x: Whether the gradient of the input is to be added to it.
        """
        self._take(factors)
        for products in self._products:
            products.backward(needs_x)
        # The left factors' gradients hold w already, through the scaled right factors.
        grad_left = self._grads.left.index_select(0, self._layout.left.scatter)
        grad_right = self._grads.right.index_select(0, self._layout.right.scatter)
        index = self._layout.component_index
        grad_weights = index.sums(grad_right * right, len(weights))
        return grad_left, index.scale(grad_right, weights), grad_weights

    def _take(self, factors: Sides) -> None:
        for own, other in zip(self._factors, factors, strict=True):
            own.copy_(other)


#: Those of every size, for the arguments of :class:`StructuredProducts`.
structured_products = Workspaces(StructuredProducts)


def _matrix(flat: Tensor, rows: int, columns: int) -> Tensor:
    """The beginning of a flat buffer as a matrix."""
    return flat[: rows * columns].view(rows, columns)


def _fit_(fitted: Tensor, x: Tensor) -> None:
    """Copies rows of x as far as there are any, and fills further ones with zeros."""
    rows = min(len(fitted), len(x))
    fitted[:rows].copy_(x[:rows])
    fitted[rows:].zero_()


def to_rows(columns: Tensor, dtype: torch.dtype) -> Tensor:
    """Copies tokens in columns to rows, (m, T) to (T, m), in ``dtype``; never a view of a buffer."""
    return torch.empty_like(columns.mT, dtype=dtype, memory_format=torch.contiguous_format).copy_(columns.mT)
