"""ΔW and the projection of its gradient by a few large operations of PyTorch.

Components of one shape lie side by side here, so that they share one matrix product: with the rows vec(A_c)
in L and w_c vec(B_c) in R, ``Lᵀ R`` is their part of ΔW in another order of entries. For ∂L/∂ΔW in that
order, P, the gradients are ``R Pᵀ`` and ``L P``. Identities need no product: their right factors lie on the
diagonal.

Small layers on a CPU spend as long on calling operations as in them, views included, and on memory that is
new. Components of one shape mostly stand at equal distances in the packed factors; L and R are then views of
those, and gradients are written in place. All layers of one size share buffers, whose views are made once.

Putting the entries of ``Lᵀ R`` in order takes longer than the product. So ΔW is made row by row of the right
factors, which leaves whole rows of ΔW in order, and where these factors are narrow, without disorder at all.
"""

from functools import cache
from typing import NamedTuple, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import ComponentIndex, Shape, group_equal, left_sizes, right_sizes, starts
from moka_pl.ops.workspaces import Workspaces

#: Right factors of fewer columns are narrow; and the most columns of all of them, side by side.
_NARROW, _MOST = 8, 32


class _Rows(NamedTuple):
    """A group's factors in a packed vector: ``members`` rows from ``start`` on, ``step`` entries apart."""

    start: int
    members: int
    size: int
    step: int

    def of(self, packed: Tensor) -> Tensor:
        """The factors as rows, (members, size); a view."""
        return packed.as_strided(
            (self.members, self.size), (self.step, 1), packed.storage_offset() + self.start
        )


class _Group(NamedTuple):
    """Components of one shape at equal distances."""

    shape: Shape
    left: _Rows
    right: _Rows


class _Layout(NamedTuple):
    """All groups, and the component of each left and right entry."""

    groups: tuple[_Group, ...]
    left: ComponentIndex
    right: ComponentIndex


@cache
@torch.inference_mode(False)  # what an evaluation builds first serves training, too
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> _Layout:
    sizes = left_sizes(shapes), right_sizes(shapes)
    begins = [starts(side) for side in sizes]
    groups = []
    for shape, members in group_equal(shapes).items():
        for run in _even_runs(members, begins):
            rows = []
            for size, begin in zip(sizes, begins, strict=True):
                step = begin[run[1]] - begin[run[0]] if len(run) > 1 else max(size[run[0]], 1)
                rows.append(_Rows(begin[run[0]], len(run), size[run[0]], step))
            groups.append(_Group(shape, *rows))
    indices = [ComponentIndex.of_sizes(side, device) for side in sizes]
    return _Layout(tuple(groups), *indices)


def _even_runs(members: list[int], begins: list[list[int]]) -> list[list[int]]:
    """Cuts the components of one shape into runs whose factors begin at equal distances, on both sides."""
    runs: list[list[int]] = []
    for i in members:
        run = runs[-1] if runs else []
        fits = len(run) == 1 or (
            len(run) > 1 and all(b[i] - b[run[-1]] == b[run[1]] - b[run[0]] for b in begins)
        )
        if fits:
            run.append(i)
        else:
            runs.append([i])
    return runs


class _Factors(NamedTuple):
    """A group's factors as the products take them.

    Attributes:
        shape: Their shape.
        left: Left factors as rows, (C, m_a n_a); empty for identities.
        right: Right factors as rows, (C, m_b n_b).
        columns: Left factors as columns, for each row of the right ones, (m_b, m_a n_a, C).
        rows: The rows of the right factors, (m_b, C, n_b).
    """

    shape: Shape
    left: Tensor
    right: Tensor
    columns: Tensor
    rows: Tensor

    @classmethod
    def of(cls, group: _Group, left: Tensor, right: Tensor) -> Self:
        """Views a group's factors in the packed vectors."""
        shape, lefts, rights = group
        b = rights.of(right)
        rows = b.view(-1, shape.m_b, shape.n_b).transpose(0, 1)
        if shape.identity:
            return cls(shape, left[:0], b, left[:0], rows)
        a = lefts.of(left)
        return cls(shape, a, b, a.mT.expand(shape.m_b, -1, -1), rows)

    @property
    def narrow(self) -> bool:
        """Whether rows of ΔW come in order by spreading left factors over diagonals."""
        return self.shape.n_b < _NARROW and len(self.right) * self.shape.n_b <= _MOST


class _Buffers(NamedTuple):
    """Where intermediates of a group lie.

    Attributes:
        part: The group's part of ΔW by rows of the right factors, (m_b, m_a n_a, n_b).
        ordered: The same in ΔW's order, (m_a, m_b, n_a n_b).
        spread: Rows of A over diagonals, (m_a, C n_b, n_a n_b), 0 elsewhere, and these diagonals, (m_a, C,
            n_a, n_b); of narrow right factors only.
        paired: D by pairs, (m_a, n_a, m_b, n_b).
        pairs: The same as a matrix, (m_a n_a, m_b n_b).
        pairs_t: Its transpose.
    """

    part: Tensor
    ordered: Tensor
    spread: tuple[Tensor, Tensor] | None
    paired: Tensor
    pairs: Tensor
    pairs_t: Tensor

    @classmethod
    def of(cls, factors: _Factors, block: Tensor) -> Self:
        """Views the buffer that all groups share."""
        m_a, n_a, m_b, n_b, _ = factors.shape
        block = block[: m_a * n_a * m_b * n_b]
        part, paired = block.view(m_b, m_a * n_a, n_b), block.view(m_a, n_a, m_b, n_b)
        pairs = paired.view(m_a * n_a, -1)
        ordered = part.view(m_b, m_a, -1).transpose(0, 1)
        return cls(part, ordered, _spread(factors) if factors.narrow else None, paired, pairs, pairs.mT)


class _Workspace:
    """Buffers for the layers of one size, and views of them.

    Attributes:
        left: For the packed left factors.
        right: For the packed right factors.
        grad_left: For the gradient of the left factors, but for their weights.
        grad_right: Likewise for the right ones.
        factors: Views of the factors, a group each.
        gradients: Those of the gradients as rows, (C, m_a n_a) and (C, m_b n_b), a group each.
        buffers: Those of a buffer as large as ΔW, a group each.
        entries: Numbers that its large buffer holds.
    """

    def __init__(self, shapes: tuple[Shape, ...], m: int, n: int, like: Tensor) -> None:
        self.left, self.grad_left = like.new_empty(2, sum(left_sizes(shapes)))
        self.right, self.grad_right = like.new_empty(2, sum(right_sizes(shapes)))
        block = like.new_empty(max(shape.rows * shape.cols for shape in shapes))
        groups = _layout(shapes, like.device).groups
        self.factors = [_Factors.of(group, self.left, self.right) for group in groups]
        self.gradients = [(g.left.of(self.grad_left), g.right.of(self.grad_right)) for g in groups]
        self.buffers = [_Buffers.of(group, block) for group in self.factors]
        self.entries = len(block)


_WORKSPACES = Workspaces(_Workspace)


def add_delta_(
    total: Tensor, left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> Tensor:
    """Adds ``Σ_i w_i (A_i ⊗ B_i)``, cut or zero-filled to m × n, and returns ``total``; differentiable.

    Args:
        total: What is changed in place, shape (m, n), contiguous.
        left: Packed left factors, contiguous.
        right: Packed right factors, contiguous.
        weights: w, shape (r,).
        shapes: r shapes.
    """
    m, n = total.shape
    layout = _layout(shapes, right.device)
    scaled = layout.right.scale(right, weights)
    if torch.is_grad_enabled():
        for group in layout.groups:
            _add_group_(total, _Factors.of(group, left, scaled), None)
        return total
    workspace = _WORKSPACES.of(shapes, m, n, like=scaled)
    workspace.left.copy_(left)
    workspace.right.copy_(scaled)
    for factors, buffers in zip(workspace.factors, workspace.buffers, strict=True):
        _add_group_(total, factors, buffers)
    return total


def _add_group_(total: Tensor, factors: _Factors, buffers: _Buffers | None) -> None:
    """Adds the components of one shape, the right factors times their weights, to a matrix.

    Args:
        total: What is changed in place, (m, n), contiguous.
        factors: Their factors.
        buffers: Where intermediates may lie; None for new memory, as gradients need it.
    """
    (m_a, n_a, m_b, n_b, identity), (m, n) = factors.shape, total.shape
    block, fits = total, (m_a * m_b, n_a * n_b) == (m, n)
    if not fits:  # it is built beside and then cut
        block = total.new_zeros(m_a * m_b, n_a * n_b)
    if identity:
        shared = factors.right.sum(0).view(m_b, n_b, 1)
        block.view(m_a, m_b, n_a, n_b).diagonal(dim1=0, dim2=2).add_(shared)  # (m_b, n_b, k)
    elif factors.narrow:
        # Each block of rows of ΔW is B, (m_b, C n_b), times a row of A of which every entry is a diagonal.
        kept = None if buffers is None else buffers.spread
        spread, diagonals = _spread(factors) if kept is None else kept
        diagonals.copy_(factors.left.view(-1, m_a, 1, n_a).transpose(0, 1).mT)  # (m_a, C, n_a, n_b)
        rows = factors.rows.reshape(m_b, -1).expand(m_a, -1, -1)  # (m_a, m_b, C n_b)
        block.view(m_a, m_b, -1).baddbmm_(rows, spread)
    elif buffers is None:
        part = torch.bmm(factors.columns, factors.rows)  # (m_b, m_a n_a, n_b)
        block.view(m_a, m_b, -1).add_(part.view(m_b, m_a, -1).transpose(0, 1))  # (m_a, m_b, n_a n_b)
    else:
        torch.bmm(factors.columns, factors.rows, out=buffers.part)
        block.view(m_a, m_b, -1).add_(buffers.ordered)
    if not fits:
        total[: m_a * m_b, : n_a * n_b] += block[:m, :n]


def _spread(factors: _Factors) -> tuple[Tensor, Tensor]:
    """Zeros for rows of A over diagonals, (m_a, C n_b, n_a n_b), and the diagonals, (m_a, C, n_a, n_b)."""
    m_a, n_a, _, n_b, _ = factors.shape
    members = len(factors.right)
    spread = factors.right.new_zeros(m_a, members, n_b, n_a, n_b)
    return spread.view(m_a, members * n_b, -1), spread.diagonal(dim1=2, dim2=4)


def project(
    grad: Tensor, left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects D = ∂L/∂ΔW to the gradients of ``left``, ``right`` and ``weights``, in their dtypes.

    For D as a tensor D[a, b, p, q] of sizes (m_a, m_b, n_a, n_b): ``dA[a,p] = w Σ_bq D[a,b,p,q] B[b,q]``,
    ``dB[b,q] = w Σ_ap D[a,b,p,q] A[a,p]``, ``dw = <dB / w, B>``.

    Args:
        grad: D, shape (m, n).
        left: Packed left factors, contiguous.
        right: Packed right factors, contiguous.
        weights: w, shape (r,).
        shapes: r shapes.
    """
    m, n = grad.shape
    grad = grad.to(right.dtype)
    layout, workspace = _layout(shapes, right.device), _WORKSPACES.of(shapes, m, n, like=grad)
    workspace.left.copy_(left)
    workspace.right.copy_(right)
    groups = zip(workspace.factors, workspace.gradients, workspace.buffers, strict=True)
    for factors, (grad_left, grad_right), buffers in groups:
        (m_a, n_a, m_b, n_b, identity), full = factors.shape, grad
        if (m_a * m_b, n_a * n_b) != (m, n):
            full = F.pad(full, (0, n_a * n_b - n, 0, m_a * m_b - m))  # negative pads cut
        blocks = full.reshape(m_a, m_b, n_a, n_b)  # D[a, b, p, q]
        if identity:
            # Only the diagonal blocks count, and all components of this shape share them.
            grad_right.copy_(blocks.diagonal(dim1=0, dim2=2).sum(-1).flatten())
            continue
        buffers.paired.copy_(blocks.transpose(1, 2))
        torch.mm(factors.right, buffers.pairs_t, out=grad_left)
        torch.mm(factors.left, buffers.pairs, out=grad_right)
    grad_left, grad_right = workspace.grad_left, workspace.grad_right
    grad_weights = layout.right.sums(grad_right * right, len(shapes))
    return layout.left.scale(grad_left, weights), layout.right.scale(grad_right, weights), grad_weights
