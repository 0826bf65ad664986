"""W + ΔW and the gradient of ΔW by a few large operations of PyTorch.

Components of one shape lie side by side here, so that they share one matrix product: with the
rows vec(A_c) in L and w_c vec(B_c) in R, ``Lᵀ R`` is their part of ΔW in another order of entries, and for
∂L/∂ΔW in that order, P, the gradients are ``R Pᵀ`` and ``L P``.
"""

from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.packing import left_sizes, right_sizes
from moka_pl.shape import Shape


class _Group(NamedTuple):
    """Components of one shape: their number, and where the first one begins among the sorted factors."""

    shape: Shape
    members: int
    left_at: int
    right_at: int


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


def can_group(shapes: tuple[Shape, ...], m: int, n: int) -> bool:
    """Whether all components cover an m × n layer exactly, without identities."""
    return all((s.rows, s.cols) == (m, n) and not s.identity for s in shapes)


@lru_cache(maxsize=256)
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> _Layout:
    equal: dict[Shape, list[int]] = {}
    for i, shape in enumerate(shapes):
        equal.setdefault(shape, []).append(i)
    order = [i for members in equal.values() for i in members]
    parts = []
    for sizes in (left_sizes(shapes), right_sizes(shapes)):
        begins = list(accumulate(sizes, initial=0))
        places = torch.cat([torch.arange(begins[i], begins[i] + sizes[i]) for i in order]).to(device)
        owners = torch.cat([torch.full((sizes[i],), i) for i in order]).to(device)
        parts.append((places, places.argsort(), owners))
    (left, left_back, left_owner), (right, right_back, right_owner) = parts
    groups, left_at, right_at = [], 0, 0
    for shape, members in equal.items():
        groups.append(_Group(shape, len(members), left_at, right_at))
        left_at += len(members) * shape.m_a * shape.n_a
        right_at += len(members) * shape.m_b * shape.n_b
    return _Layout(tuple(groups), left, right, left_back, right_back, left_owner, right_owner)


def add_delta(
    base: Tensor, left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> Tensor:
    """Returns ``W + Σ_i w_i (A_i ⊗ B_i)``, shape (m, n), for shapes that :func:`can_group`.

    Args:
        base: W, shape (m, n).
        left: Packed left factors.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.
    """
    layout = _layout(shapes, right.device)
    lefts = left[layout.left]
    rights = right[layout.right] * weights[layout.right_owner]
    total = base.clone()
    scratch = torch.empty_like(total).view(-1)  # one for all groups: fresh memory costs more than the sums
    for shape, members, left_at, right_at in layout.groups:
        part_l, part_r = _members(lefts, rights, shape, members, left_at, right_at)
        part = torch.mm(part_l.mT, part_r, out=scratch.view(part_l.shape[1], part_r.shape[1]))
        part = part.view(shape.m_a, shape.n_a, shape.m_b, shape.n_b)
        total.view(shape.m_a, shape.m_b, shape.n_a, shape.n_b).add_(part.transpose(1, 2))
    return total


def project(
    grad: Tensor, left: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Pulls D = ∂L/∂ΔW back to the packed factors and the weights.

    Args:
        grad: D, shape (m, n).
        left: Packed left factors.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes that :func:`can_group`.

    Returns:
        Gradients of ``left``, ``right`` and ``weights``.
    """
    layout = _layout(shapes, right.device)
    lefts, rights = left[layout.left], right[layout.right]
    grad_lefts, grad_rights = torch.empty_like(lefts), torch.empty_like(rights)
    grad = grad.contiguous()
    scratch = torch.empty_like(grad).view(-1)
    for shape, members, left_at, right_at in layout.groups:
        part_l, part_r = _members(lefts, rights, shape, members, left_at, right_at)
        into_l, into_r = _members(grad_lefts, grad_rights, shape, members, left_at, right_at)
        ordered = scratch.view(shape.m_a, shape.n_a, shape.m_b, shape.n_b)
        ordered.copy_(grad.view(shape.m_a, shape.m_b, shape.n_a, shape.n_b).transpose(1, 2))
        paired = scratch.view(part_l.shape[1], part_r.shape[1])  # (m_a n_a, m_b n_b)
        torch.mm(part_r, paired.mT, out=into_l)
        torch.mm(part_l, paired, out=into_r)
    grad_weights = torch.zeros_like(weights).index_add_(0, layout.right_owner, grad_rights * rights)
    grad_lefts *= weights[layout.left_owner]
    grad_rights *= weights[layout.right_owner]
    return grad_lefts[layout.left_back], grad_rights[layout.right_back], grad_weights


def _members(
    lefts: Tensor, rights: Tensor, shape: Shape, members: int, left_at: int, right_at: int
) -> tuple[Tensor, Tensor]:
    """Views of a group's sorted factors, (c, m_a n_a) and (c, m_b n_b)."""
    left, right = shape.m_a * shape.n_a, shape.m_b * shape.n_b
    return (
        lefts[left_at : left_at + members * left].view(members, left),
        rights[right_at : right_at + members * right].view(members, right),
    )
