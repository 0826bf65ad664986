"""ΔW and the projection of its gradient by a few large operations of PyTorch.

Components of one shape lie side by side here, so that they share one matrix product: with the rows vec(A_c)
in L and w_c vec(B_c) in R, ``Lᵀ R`` is their part of ΔW in another order of entries. For ∂L/∂ΔW in that
order, P, the gradients are ``R Pᵀ`` and ``L P``. Identities need no product: their right factors lie on the
diagonal.

Small layers on a CPU spend as long on calling operations as in them. Components of one shape mostly stand at
equal distances in the packed factors; L and R are then views of those, and gradients are written in place.

Putting the entries of ``Lᵀ R`` in order takes longer than the product. So ΔW is made row by row of the right
factors, which leaves whole rows of ΔW in order, and where these factors are narrow, without disorder at all.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import ComponentIndex, Shape, group_equal, left_sizes, right_sizes, starts

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
    for shape, lefts, rights in layout.groups:
        fits = (shape.rows, shape.cols) == (m, n)
        # What does not fit is built beside and then cut.
        block = total if fits else total.new_zeros(shape.rows, shape.cols)
        blocks = block.view(shape.m_a, shape.m_b, shape.n_a, shape.n_b)
        if shape.identity:
            shared = rights.of(scaled).sum(0).view(shape.m_b, shape.n_b, 1)
            blocks.diagonal(dim1=0, dim2=2).add_(shared)  # (m_b, n_b, k)
        else:
            _add_group_(block, shape, lefts.of(left), rights.of(scaled))
        if not fits:
            total[: shape.rows, : shape.cols] += block[:m, :n]
    return total


def _add_group_(total: Tensor, shape: Shape, left: Tensor, right: Tensor) -> None:
    """Adds the components of one shape to a matrix of its size.

    Args:
        total: What is changed in place, (m_a m_b, n_a n_b), contiguous.
        shape: Their shape.
        left: Their left factors as rows, (C, m_a n_a).
        right: Their right factors as rows, times their weights, (C, m_b n_b).
    """
    m_a, n_a, m_b, n_b, _ = shape
    members = len(left)
    right = right.view(members, m_b, n_b).transpose(0, 1)  # (m_b, C, n_b)
    if n_b < _NARROW and members * n_b <= _MOST:
        # Each block of rows of ΔW is B, (m_b, C n_b), times a row of A of which every entry is a diagonal.
        spread = left.new_zeros(m_a, members, n_b, n_a, n_b)
        a = left.view(members, m_a, 1, n_a).transpose(0, 1)  # (m_a, C, 1, n_a)
        spread.diagonal(dim1=2, dim2=4).copy_(a.mT)  # (m_a, C, n_a, n_b)
        right = right.reshape(m_b, -1).expand(m_a, -1, -1)  # (m_a, m_b, C n_b)
        total.view(m_a, m_b, -1).baddbmm_(right, spread.view(m_a, members * n_b, -1))
        return
    part = torch.bmm(left.mT.expand(m_b, -1, -1), right)  # (m_b, m_a n_a, n_b)
    total.view(m_a, m_b, -1).add_(part.view(m_b, m_a, -1).transpose(0, 1))  # (m_a, m_b, n_a n_b)


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
    layout = _layout(shapes, right.device)
    grad_left, grad_right = torch.empty_like(left), torch.empty_like(right)
    for shape, lefts, rights in layout.groups:
        full = grad
        if (shape.rows, shape.cols) != (m, n):
            full = F.pad(full, (0, shape.cols - n, 0, shape.rows - m))  # negative pads cut
        blocks = full.reshape(shape.m_a, shape.m_b, shape.n_a, shape.n_b)  # D[a, b, p, q]
        if shape.identity:
            # Only the diagonal blocks count, and all components of this shape share them.
            rights.of(grad_right).copy_(blocks.diagonal(dim1=0, dim2=2).sum(-1).flatten())
            continue
        paired = blocks.transpose(1, 2).reshape(shape.m_a * shape.n_a, -1)  # (m_a n_a, m_b n_b)
        torch.mm(rights.of(right), paired.mT, out=lefts.of(grad_left))
        torch.mm(lefts.of(left), paired, out=rights.of(grad_right))
        del paired  # as above
    grad_weights = layout.right.sums(grad_right * right, len(shapes))
    return layout.left.scale(grad_left, weights), layout.right.scale(grad_right, weights), grad_weights
