"""ΔW and the pull-back of its gradient by a few large operations of PyTorch.

Components of one shape lie side by side here, so that they share one matrix product: with the rows vec(A_c)
in L and w_c vec(B_c) in R, ``Lᵀ R`` is their part of ΔW in another order of entries. For ∂L/∂ΔW in that
order, P, the gradients are ``R Pᵀ`` and ``L P``. Identities need no product: their right factors lie on the
diagonal.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.packing import left_sizes, right_sizes, starts
from moka_pl.shape import Shape, group_equal


class _Group(NamedTuple):
    """Components of one shape: their number, and where the first one begins among the sorted factors."""

    shape: Shape
    members: int
    left_at: int
    right_at: int

    def left(self, sorted_left: Tensor) -> Tensor:
        """The group's rows vec(A_c), (c, m_a n_a); a view."""
        size = self.shape.m_a * self.shape.n_a
        return sorted_left[self.left_at : self.left_at + self.members * size].view(self.members, size)

    def right(self, sorted_right: Tensor) -> Tensor:
        """The group's rows vec(B_c), (c, m_b n_b); a view."""
        size = self.shape.m_b * self.shape.n_b
        return sorted_right[self.right_at : self.right_at + self.members * size].view(self.members, size)


class _Layout(NamedTuple):
    """Groups, and for sorted entries the place in the packed factors and the component.

    Attributes:
        groups: The groups in order.
        left: Places of the sorted left entries.
        right: Places of the sorted right entries.
        left_back: Places of the packed left entries among the sorted ones.
        right_back: The same for right entries.
        left_owner: Component of every sorted left entry.
        right_owner: Component of every sorted right entry.
    """

    groups: tuple[_Group, ...]
    left: Tensor
    right: Tensor
    left_back: Tensor
    right_back: Tensor
    left_owner: Tensor
    right_owner: Tensor


@lru_cache(maxsize=256)
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> _Layout:
    equal = group_equal(shapes)
    order = [i for members in equal.values() for i in members]
    parts = []
    for sizes in (left_sizes(shapes), right_sizes(shapes)):
        begins = starts(sizes)
        places = torch.cat([torch.arange(begins[i], begins[i] + sizes[i]) for i in order]).to(device)
        owners = torch.cat([torch.full((sizes[i],), i) for i in order]).to(device)
        parts.append((places, places.argsort(), owners))
    (left, left_back, left_owner), (right, right_back, right_owner) = parts
    groups, left_at, right_at = [], 0, 0
    for shape, members in equal.items():
        groups.append(_Group(shape, len(members), left_at, right_at))
        left_at += sum(left_sizes(shapes)[i] for i in members)
        right_at += sum(right_sizes(shapes)[i] for i in members)
    return _Layout(tuple(groups), left, right, left_back, right_back, left_owner, right_owner)


def add_delta_(
    total: Tensor, left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> Tensor:
    """Adds ``Σ_i w_i (A_i ⊗ B_i)``, cut or zero-filled to m × n, in place; differentiable.

    Args:
        total: What to add to, shape (m, n), contiguous.
        left: Packed left factors.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.

    Returns:
        ``total``.
    """
    m, n = total.shape
    layout = _layout(shapes, right.device)
    lefts = left[layout.left]
    rights = right[layout.right] * weights[layout.right_owner]
    for group in layout.groups:
        shape = group.shape
        fits = (shape.rows, shape.cols) == (m, n)
        # What does not fit is built beside and then cut.
        block = total if fits else total.new_zeros(shape.rows, shape.cols)
        blocks = block.view(shape.m_a, shape.m_b, shape.n_a, shape.n_b)
        if shape.identity:
            shared = group.right(rights).sum(0).view(shape.m_b, shape.n_b, 1)
            blocks.diagonal(dim1=0, dim2=2).add_(shared)  # (m_b, n_b, k)
        else:
            part = group.left(lefts).mT @ group.right(rights)  # (m_a n_a, m_b n_b)
            part = part.view(shape.m_a, shape.n_a, shape.m_b, shape.n_b)
            blocks.add_(part.transpose(1, 2))  # (m_a, m_b, n_a, n_b)
        if not fits:
            total[: shape.rows, : shape.cols] += block[:m, :n]
    return total


def project(
    grad: Tensor, left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pulls D = ∂L/∂ΔW back to the packed factors and the weights.

    For D as a tensor D[a, b, p, q] of sizes (m_a, m_b, n_a, n_b): ``dA[a,p] = w Σ_bq D[a,b,p,q] B[b,q]``,
    ``dB[b,q] = w Σ_ap D[a,b,p,q] A[a,p]``, ``dw = <dB / w, B>``.

    Args:
        grad: D, shape (m, n).
        left: Packed left factors.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.

    Returns:
        Gradients of ``left``, ``right`` and ``weights``, in their dtypes.
    """
    m, n = grad.shape
    grad = grad.to(right.dtype)
    layout = _layout(shapes, right.device)
    lefts, rights = left[layout.left], right[layout.right]
    grad_lefts, grad_rights = torch.empty_like(lefts), torch.empty_like(rights)
    for group in layout.groups:
        shape = group.shape
        full = grad
        if (shape.rows, shape.cols) != (m, n):
            full = F.pad(full, (0, shape.cols - n, 0, shape.rows - m))  # negative pads cut
        blocks = full.reshape(shape.m_a, shape.m_b, shape.n_a, shape.n_b)
        if shape.identity:
            # Only the diagonal blocks count, and all components of this shape share them.
            group.right(grad_rights).copy_(blocks.diagonal(dim1=0, dim2=2).sum(-1).flatten())
            continue
        paired = blocks.transpose(1, 2).reshape(shape.m_a * shape.n_a, -1)  # (m_a n_a, m_b n_b)
        torch.mm(group.right(rights), paired.mT, out=group.left(grad_lefts))
        torch.mm(group.left(lefts), paired, out=group.right(grad_rights))
    grad_weights = torch.zeros_like(weights).index_add_(0, layout.right_owner, grad_rights * rights)
    grad_lefts *= weights[layout.left_owner]
    grad_rights *= weights[layout.right_owner]
    return grad_lefts[layout.left_back], grad_rights[layout.right_back], grad_weights
