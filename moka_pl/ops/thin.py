"""``Σ_i w_i (A_i ⊗ B_i) x`` as the product of two thin matrices, where the components' ranks are small.

A component whose left factor has few rows and whose right one has few columns is a LoRA of rank m_a n_b:
``y = flatten(H Bᵀ)`` with ``H = A X`` of as many numbers. As the matrices of a LoRA, with δ the identity::

    L[(a, q), (p, q')] = A[a, p] δ_qq'        (m_a n_b, n)      hidden = L x
    U[(a', b), (a, q)] = δ_aa' w B[b, q]      (m, m_a n_b)      y = U hidden

The R = Σ m_a n_b hidden numbers of a token lie side by side, component by component, row by row. L and U are
filled in for the time of a product and hold R (m + n) entries. An update is then two matrix products forward
and four backward, for all components at once, and where these stand out of the layer, or do not cover it, L
and U are cut or filled up, and not the activations.

Products run in the dtype of x, as a LoRA's own do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import ComponentIndex, Shape, right_sizes
from moka_pl.ops.merged_forward import DenseUpdates

#: How many times smaller than a layer's shorter side R must be.
_THIN = 4


@cache
def is_thin(shapes: tuple[Shape, ...], m: int, n: int) -> bool:
    """Whether two thin products are the cheapest computation of an m × n layer's update, whatever T.

    Args:
        shapes: r shapes.
        m: Output features.
        n: Input features.
    """
    return not any(s.identity for s in shapes) and _THIN * hidden_size(shapes) <= min(m, n)


@cache
def hidden_size(shapes: tuple[Shape, ...]) -> int:
    """R, the hidden numbers of a token."""
    return sum(s.m_a * s.n_b for s in shapes)


class _Run(NamedTuple):
    """Neighbouring components of one shape.

    Attributes:
        shape: Their shape.
        members: Their number C.
        hidden: Where their hidden numbers begin.
        left: Where their left factors begin in the packed vector.
        right: Where their right factors begin.
    """

    shape: Shape
    members: int
    hidden: int
    left: int
    right: int

    def lefts(self, packed: Tensor) -> Tensor:
        """Their left factors, (C, m_a, n_a, 1)."""
        s, count = self.shape, self.members
        size = count * s.m_a * s.n_a
        return packed[self.left : self.left + size].view(count, s.m_a, s.n_a, 1)

    def rights(self, packed: Tensor) -> Tensor:
        """Their right factors, (C, 1, m_b, n_b)."""
        s, count = self.shape, self.members
        size = count * s.m_b * s.n_b
        return packed[self.right : self.right + size].view(count, 1, s.m_b, s.n_b)

    def in_left(self, matrix: Tensor) -> Tensor:
        """Where A[a, p] stands for every q in L of (R, columns), (C, m_a, n_a, n_b)."""
        s, width = self.shape, matrix.shape[1]
        steps = s.m_a * s.n_b * width, s.n_b * width, s.n_b, width + 1
        return matrix.as_strided((self.members, s.m_a, s.n_a, s.n_b), steps, self.hidden * width)

    def in_right(self, matrix: Tensor) -> Tensor:
        """Where B[b, q] stands for every a in U of (rows, R), (C, m_a, m_b, n_b)."""
        s, width = self.shape, matrix.shape[1]
        steps = s.m_a * s.n_b, s.m_b * width + s.n_b, width, 1
        return matrix.as_strided((self.members, s.m_a, s.m_b, s.n_b), steps, self.hidden)


class _Layout(NamedTuple):
    """All runs, the rows and columns of the largest component, and the component of each right entry."""

    runs: tuple[_Run, ...]
    rows: int
    columns: int
    component_index: ComponentIndex


@cache
@torch.inference_mode(False)  # what an evaluation builds first serves training, too
def _layout(shapes: tuple[Shape, ...], device: torch.device) -> _Layout:
    runs, hidden, left, right = [], 0, 0, 0
    for s, equal in groupby(shapes):
        count = len(list(equal))
        runs.append(_Run(s, count, hidden, left, right))
        hidden += count * s.m_a * s.n_b
        left, right = left + count * s.m_a * s.n_a, right + count * s.m_b * s.n_b
    sides = max(s.rows for s in shapes), max(s.cols for s in shapes)
    return _Layout(tuple(runs), *sides, ComponentIndex.of_sizes(right_sizes(shapes), device))


def lora_left(left: Tensor, shapes: tuple[Shape, ...], n: int, dtype: torch.dtype) -> Tensor:
    """Returns L, shape (R, n).

    Args:
        left: Packed left factors.
        shapes: r shapes.
        n: Input features.
        dtype: Dtype of the result.
    """
    layout = _layout(shapes, left.device)
    matrix = left.new_zeros(hidden_size(shapes), max(n, layout.columns), dtype=dtype)
    for run in layout.runs:
        run.in_left(matrix).copy_(run.lefts(left))
    return matrix[:, :n]


def lora_right(
    right: Tensor, weights: Tensor, shapes: tuple[Shape, ...], m: int, dtype: torch.dtype
) -> Tensor:
    """Returns U, shape (m, R).

    Args:
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.
        m: Output features.
        dtype: Dtype of the result.
    """
    layout = _layout(shapes, right.device)
    matrix = right.new_zeros(max(m, layout.rows), hidden_size(shapes), dtype=dtype)
    scaled = layout.component_index.scale(right, weights)
    for run in layout.runs:
        run.in_right(matrix).copy_(run.rights(scaled))
    return matrix[:m]


def down(x: Tensor, left: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
    """Computes ``H_i = A_i X`` of all components, shape (T, R), for x of shape (T, n).

    Args:
        x: Input.
        left: Packed left factors.
        shapes: r shapes.
    """
    return x @ lora_left(left, shapes, x.shape[1], x.dtype).mT


def add_up_(out: Tensor, hidden: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]) -> Tensor:
    """Adds ``Σ_i w_i flatten(H_i B_iᵀ)`` to ``out`` and returns that.

    Args:
        out: What is changed in place, shape (T, m).
        hidden: H of all components, shape (T, R), in the dtype of ``out``.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.
    """
    return out.addmm_(hidden, lora_right(right, weights, shapes, out.shape[1], out.dtype).mT)


def up_backward(
    grad: Tensor, hidden: Tensor, right: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``hidden``, (T, R), ``right`` and ``weights`` in :func:`add_up_`.

    Since the product is linear in B, ``dw_i = <dB_i / w_i, B_i>``.

    Args:
        grad: Gradient of the sum, shape (T, m).
        hidden: H of all components, shape (T, R), in the dtype of ``grad``.
        right: Packed right factors.
        weights: w, shape (r,).
        shapes: r shapes.
    """
    m = grad.shape[1]
    layout = _layout(shapes, right.device)
    grad_hidden = grad @ lora_right(right, weights, shapes, m, grad.dtype)  # (T, R)
    full = grad.mT @ hidden  # (m, R)
    if layout.rows > m:
        full = F.pad(full, (0, 0, 0, layout.rows - m))
    grad_right = torch.empty_like(right)
    for run in layout.runs:
        run.rights(grad_right)[:, 0].copy_(run.in_right(full).sum(1))
    grad_weights = layout.component_index.sums(grad_right * right, len(shapes))
    return grad_hidden, layout.component_index.scale(grad_right, weights), grad_weights


def down_backward(
    x: Tensor, grad_hidden: Tensor, left: Tensor, shapes: tuple[Shape, ...], grad_x: Tensor | None
) -> Tensor:
    """Returns the gradient of ``left`` in :func:`down`, and adds that of ``x`` to ``grad_x``.

    Args:
        x: Input, shape (T, n).
        grad_hidden: Gradient of the result, shape (T, R), in the dtype of ``x``.
        left: Packed left factors.
        shapes: r shapes.
        grad_x: What is changed in place, shape (T, n); None where nobody needs it.
    """
    n = x.shape[1]
    layout = _layout(shapes, left.device)
    if grad_x is not None:
        grad_x.addmm_(grad_hidden, lora_left(left, shapes, n, x.dtype))
    full = grad_hidden.mT @ x  # (R, n)
    if layout.columns > n:
        full = F.pad(full, (0, layout.columns - n))
    grad_left = torch.empty_like(left)
    for run in layout.runs:
        run.lefts(grad_left)[..., 0].copy_(run.in_left(full).sum(-1))
    return grad_left


@dataclass(frozen=True, eq=False)
class ThinUpdates(DenseUpdates):
    """The frozen layer's own product, and two thin ones beside it that add to its result in place.

    Args:
        frozen: Computes ``W x + bias``, shape (T, m), as the frozen layer does; None for ΔW alone.
    """

    frozen: Callable[[Tensor], Tensor] | None = None

    def product(
        self, x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """As :meth:`DenseUpdates.product`; keeps the hidden numbers."""
        out = x.new_zeros(len(x), self.m) if self.frozen is None else self.frozen(x)  # (T, m)
        hidden = down(x, left, self.shapes)  # (T, R)
        weights = self._alpha(gate, right) * self.scaling  # (r,)
        return add_up_(out, hidden, right, weights, self.shapes), hidden

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        gate: Tensor | None,
        kept: Tensor | None,
        needs_x: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """As :meth:`DenseUpdates.backward`."""
        grad_x = None
        if needs_x and self.base_weight is None:
            grad_x = torch.zeros_like(x)  # (T, n)
        elif needs_x and self.base_weight is not None:
            grad_x = grad @ self.base_weight().to(grad.dtype)  # (T, n)
        hidden = down(x, left, self.shapes) if kept is None else kept
        alpha = self._alpha(gate, right)  # (r,)
        grad_hidden, grad_right, grad_weights = up_backward(
            grad, hidden, right, alpha * self.scaling, self.shapes
        )
        grad_left = down_backward(x, grad_hidden, left, self.shapes, grad_x)
        return grad_x, grad_left, grad_right, self._gate_gradient(gate, alpha, grad_weights)
