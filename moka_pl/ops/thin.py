"""``Σ_i w_i (A_i ⊗ B_i) x`` as the product of two thin matrices, where the components' ranks are small.

A component whose left factor has few rows and whose right one has few columns is a LoRA of rank m_a n_b:
``y = flatten(H Bᵀ)`` with ``H = A X`` of as many numbers. As the matrices of a LoRA, with δ the identity::

    L[(a, q), (p, q')] = A[a, p] δ_qq'        (m_a n_b, n)      hidden = L x
    U[(a', b), (a, q)] = δ_aa' w B[b, q]      (m, m_a n_b)      y = U hidden

The R = Σ m_a n_b hidden numbers of a token lie side by side, component by component, row by row. L and U are
filled in for a step and hold R (m + n) entries. An update is then two matrix products forward and four
backward, for all components at once, and where these stand out of the layer, or do not cover it, L and U are
cut or filled up, and not the activations.

Where all components have as many rows as the layer, U is not needed: the output and its gradient, m_a m_b
numbers a token, are matrices of (T m_a, m_b), too, and meet H as one of (T m_a, C n_b).

Products run in the dtype of x, as a LoRA's own do.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.layout import ComponentIndex, Shape, right_sizes
from moka_pl.ops.merged_forward import DenseUpdates, Keep

#: The weights w of the components, (r,), or one number for all.
Weights = Tensor | float

#: L, once it was made, by dtype and device.
Rooms = dict[tuple[torch.dtype, torch.device], Tensor]

#: How many times smaller than a layer's shorter side R must be.
_THIN = 3


def thin_pays(shapes: tuple[Shape, ...], m: int, n: int) -> bool:
    """Whether two thin products are the cheapest computation of an m × n layer's update, whatever T.

    In float32 on a CPU core, forward and backward of 4-bit layers of 192 × 576, 576 × 576 and 1536 × 576,
    64 and 512 tokens: with R = 16 at most 0.96 of the time of the better other backend (0.72 at 192 × 576
    and 512 tokens), with R = 64 at most 1.10, mostly 0.75 to 0.97. From R = 128 on the layer of 192 × 576
    takes 1.12 to 1.26 times as long; R = 192 costs the others 0.92 to 1.19.

    Args:
        shapes: r shapes.
        m: Output features.
        n: Input features.
    """
    return not any(s.identity for s in shapes) and _THIN * count_hidden(shapes) <= min(m, n)


def count_hidden(shapes: tuple[Shape, ...]) -> int:
    """R, the hidden numbers of a token."""
    return sum(s.m_a * s.n_b for s in shapes)


#: The same, remembered; a compiler that traces these would warn of it.
is_thin, hidden_size = cache(thin_pays), cache(count_hidden)


class _Run(NamedTuple):
    """Equal components that are neighbours.

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
        """Their left factors, (C, m_a, n_a); a view."""
        m_a, n_a, *_ = self.shape
        start = packed.storage_offset() + self.left
        return packed.as_strided((self.members, m_a, n_a), (m_a * n_a, n_a, 1), start)

    def rights(self, packed: Tensor) -> Tensor:
        """Their right factors, transposed, (C, n_b, m_b); a view."""
        _, _, m_b, n_b, _ = self.shape
        start = packed.storage_offset() + self.right
        return packed.as_strided((self.members, n_b, m_b), (m_b * n_b, 1, n_b), start)

    def in_left(self, matrix: Tensor) -> Tensor:
        """Where A[a, p] stands for every q in L of (R, columns), (n_b, C, m_a, n_a); a view."""
        (m_a, n_a, _, n_b, _), width = self.shape, matrix.shape[1]
        steps = width + 1, m_a * n_b * width, n_b * width, n_b
        return matrix.as_strided((n_b, self.members, m_a, n_a), steps, self.hidden * width)

    def in_right(self, matrix: Tensor) -> Tensor:
        """Where B[b, q] stands for every a in U of (rows, R), (m_a, C, n_b, m_b); a view."""
        (m_a, _, m_b, n_b, _), width = self.shape, matrix.shape[1]
        steps = m_b * width + n_b, m_a * n_b, 1, width
        return matrix.as_strided((m_a, self.members, n_b, m_b), steps, self.hidden)

    def rows_of(self, hidden: Tensor) -> Tensor:
        """Their hidden numbers of (T, R) as (T m_a, C n_b)."""
        m_a, n_b, count = self.shape.m_a, self.shape.n_b, self.members
        size = count * m_a * n_b
        own = hidden if size == hidden.shape[1] else hidden[:, self.hidden : self.hidden + size]
        if count > 1:
            own = own.view(-1, count, m_a, n_b).transpose(1, 2)
        return own.reshape(-1, count * n_b)

    def hidden_of(self, rows: Tensor) -> Tensor:
        """The reverse of :meth:`rows_of`, (T, C m_a n_b)."""
        m_a, n_b, count = self.shape.m_a, self.shape.n_b, self.members
        if count > 1:
            rows = rows.view(-1, m_a, count, n_b).transpose(1, 2)
        return rows.reshape(-1, count * m_a * n_b)


class _Layout(NamedTuple):
    """All runs, the rows and columns of the largest component, and the component of each right entry.

    Attributes:
        runs: The runs.
        hidden: R.
        rows: Rows of all components; 0 where they differ.
        highest: Rows of the highest component.
        widest: Columns of the widest component.
        component_index: The component of each packed right entry.
    """

    runs: tuple[_Run, ...]
    hidden: int
    rows: int
    highest: int
    widest: int
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
    rows = {s.rows for s in shapes}
    return _Layout(
        tuple(runs),
        hidden,
        rows=rows.copy().pop() if len(rows) == 1 else 0,
        highest=max(rows),
        widest=max(s.cols for s in shapes),
        component_index=ComponentIndex.of_sizes(right_sizes(shapes), device),
    )


def lora_left(
    left: Tensor, shapes: tuple[Shape, ...], n: int, dtype: torch.dtype, room: Rooms | None = None
) -> Tensor:
    """Returns L, shape (R, n).

    Args:
        left: Packed left factors.
        shapes: r shapes.
        n: Input features.
        dtype: Dtype of the result.
        room: Where L of an earlier call on a CPU lies, whose zeros need not be written again.
    """
    layout = _layout(shapes, left.device)
    matrix = None if room is None else room.get((dtype, left.device))
    if matrix is None:
        with torch.inference_mode(False):  # what an evaluation makes first serves training, too
            matrix = torch.zeros(layout.hidden, max(n, layout.widest), dtype=dtype, device=left.device)
        # No stand-in for a tensor, which a trace puts here, and no memory that belongs to a CUDA graph.
        if room is not None and type(matrix) is Tensor and left.device.type == "cpu":
            room[dtype, left.device] = matrix
    for run in layout.runs:
        run.in_left(matrix).copy_(run.lefts(left))
    return matrix if n >= layout.widest else matrix[:, :n]


def lora_right(
    right: Tensor, weights: Weights, shapes: tuple[Shape, ...], m: int, dtype: torch.dtype
) -> Tensor:
    """Returns U, shape (m, R).

    Args:
        right: Packed right factors.
        weights: w, shape (r,), or one number for all.
        shapes: r shapes.
        m: Output features.
        dtype: Dtype of the result.
    """
    layout = _layout(shapes, right.device)
    matrix = torch.zeros(max(m, layout.highest), layout.hidden, dtype=dtype, device=right.device)
    right = _scaled(right, weights, layout)
    for run in layout.runs:
        run.in_right(matrix).copy_(run.rights(right))
    return matrix if m >= layout.highest else matrix[:m]


def _scaled(right: Tensor, weights: Weights, layout: _Layout) -> Tensor:
    """The packed right factors, or their gradients, times the weights."""
    if isinstance(weights, float):
        return right if weights == 1 else right * weights
    return layout.component_index.scale(right, weights)


def down(x: Tensor, left: Tensor, shapes: tuple[Shape, ...], room: Rooms | None = None) -> Tensor:
    """Computes ``H_i = A_i X`` of all components, shape (T, R), for x of shape (T, n).

    Args:
        x: Input.
        left: Packed left factors.
        shapes: r shapes.
        room: As for :func:`lora_left`.
    """
    return torch.mm(x, lora_left(left, shapes, x.shape[1], x.dtype, room).t())


def add_up_(
    out: Tensor, hidden: Tensor, right: Tensor, weights: Weights, shapes: tuple[Shape, ...]
) -> Tensor:
    """Adds ``Σ_i w_i flatten(H_i B_iᵀ)`` to ``out`` and returns that.

    Args:
        out: What is changed in place, shape (T, m), contiguous.
        hidden: H of all components, shape (T, R), in the dtype of ``out``.
        right: Packed right factors.
        weights: w, shape (r,), or one number for all.
        shapes: r shapes.
    """
    m = out.shape[1]
    layout = _layout(shapes, right.device)
    if layout.rows != m:
        return out.addmm_(hidden, lora_right(right, weights, shapes, m, out.dtype).t())
    right = _scaled(right, weights, layout).to(out.dtype)
    for run in layout.runs:
        m_b = run.shape.m_b
        factors = run.rights(right).reshape(-1, m_b)  # (C n_b, m_b)
        out.view(-1, m_b).addmm_(run.rows_of(hidden), factors)  # (T m_a, m_b)
    return out


def up_backward(
    grad: Tensor, hidden: Tensor, right: Tensor, weights: Weights, shapes: tuple[Shape, ...]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of ``hidden``, (T, R), ``right`` and ``weights`` in :func:`add_up_`.

    Since the product is linear in B, ``dw_i = <dB_i / w_i, B_i>``. A number for all weights has no gradient.

    Args:
        grad: Gradient of the sum, shape (T, m), contiguous.
        hidden: H of all components, shape (T, R), in the dtype of ``grad``.
        right: Packed right factors.
        weights: w, shape (r,), or one number for all.
        shapes: r shapes.
    """
    m = grad.shape[1]
    layout = _layout(shapes, right.device)
    hidden_parts, right_parts = [], []
    if layout.rows == m:
        scaled = _scaled(right, weights, layout).to(grad.dtype)
        for run in layout.runs:
            _, _, m_b, n_b, _ = run.shape
            rows = grad.view(-1, m_b)  # (T m_a, m_b)
            factors = run.rights(scaled).contiguous().view(-1, m_b)  # (C n_b, m_b)
            hidden_parts.append(run.hidden_of(torch.mm(rows, factors.t())))  # (T, C m_a n_b)
            full = torch.mm(run.rows_of(hidden).t(), rows)  # (C n_b, m_b)
            right_parts.append(full.view(-1, n_b, m_b).mT.reshape(-1))
    else:
        hidden_parts.append(torch.mm(grad, lora_right(right, weights, shapes, m, grad.dtype)))  # (T, R)
        full = F.pad(torch.mm(grad.t(), hidden), (0, 0, 0, max(0, layout.highest - m)))  # (rows, R)
        right_parts += [run.in_right(full).sum(0).mT.reshape(-1) for run in layout.runs]
    grad_hidden, grad_right = _joined(hidden_parts, 1), _joined(right_parts).to(right.dtype)
    grad_weights = None
    if not isinstance(weights, float):
        grad_weights = layout.component_index.sums(grad_right * right, len(shapes))
    return grad_hidden, _scaled(grad_right, weights, layout), grad_weights


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
    full = torch.mm(grad_hidden.t(), x)  # (R, n)
    if layout.widest > n:
        full = F.pad(full, (0, layout.widest - n))
    return _joined([run.in_left(full).sum(0).view(-1) for run in layout.runs]).to(left.dtype)


def _joined(parts: list[Tensor], dim: int = 0) -> Tensor:
    """The parts one after another."""
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass(frozen=True, eq=False)
class ThinUpdates(DenseUpdates):
    """The frozen layer's own product, and two thin ones beside it that add to its result in place.

    Args:
        frozen: Computes ``W x + bias``, shape (T, m), as the frozen layer does; None for ΔW alone.
        frozen_gradient: Computes ``G W``, shape (T, n), of G, (T, m), where the frozen layer does so in its
            own way; returns None where it does not.
        room: As for :func:`lora_left`.
    """

    frozen: Callable[[Tensor], Tensor] | None = None
    frozen_gradient: Callable[[Tensor], Tensor | None] | None = None
    room: Rooms = field(default_factory=dict)

    def merges(self, tokens: int) -> bool:
        """Whether the update of so many tokens is added to W, and no hidden numbers are kept."""
        return False

    def product(
        self, x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, gate: Tensor | None, keep: Keep
    ) -> Tensor:
        """As :meth:`DenseUpdates.product`; keeps the hidden numbers."""
        hidden = down(x, left, self.shapes, self.room)  # (T, R)
        keep(hidden)
        out = x.new_zeros(len(x), self.m) if self.frozen is None else self.frozen(x)  # (T, m)
        return add_up_(out, hidden, right, self._weights(gate), self.shapes)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        gate: Tensor | None,
        kept: tuple[Tensor, ...],
        needs_x: bool,
        total: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """As :meth:`DenseUpdates.backward`."""
        (hidden,) = kept
        weights = self._weights(gate)
        grad_hidden, grad_right, grad_weights = up_backward(grad, hidden, right, weights, self.shapes)
        grad_left = down_backward(x, grad_hidden, left, self.shapes, None)
        grad_x = None
        if needs_x:
            matrix = lora_left(left, self.shapes, self.n, x.dtype, self.room)  # (R, n)
            grad_x = self._frozen_gradient(grad)  # (T, n)
            if grad_x is not None:
                grad_x.addmm_(grad_hidden, matrix)
            else:
                grad_x = torch.mm(grad_hidden, matrix)  # (T, n)
                if self.base_weight is not None:
                    grad_x.addmm_(grad, self.base_weight().to(grad.dtype))
            grad_x = grad_x if total is None else grad_x.add_(total)
        if gate is None or grad_weights is None:
            return grad_x, grad_left, grad_right, None if gate is None else torch.zeros_like(gate)
        alpha = self._alpha(gate, right)  # (r,)
        return grad_x, grad_left, grad_right, self._gate_gradient(gate, alpha, grad_weights)

    def _frozen_gradient(self, grad: Tensor) -> Tensor | None:
        return None if self.frozen_gradient is None else self.frozen_gradient(grad)

    def _weights(self, gate: Tensor | None) -> Weights:
        """w, a single number where all are equal whatever is trained."""
        if gate is None:
            return self.scaling / len(self.shapes)
        if len(self.shapes) == 1 and self.gating == "softmax":
            return float(self.scaling)  # somebody may have set a whole number
        return self._alpha(gate, gate) * self.scaling  # (r,)
