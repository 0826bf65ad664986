"""Two thin products of an update in few passes over the activations: x and y forward, G and x backward.

L, (R, n), and U, (m, R), are the thin matrices that :mod:`moka_pl.ops.thin` describes; here U lies
transposed, (R, m), so that both are read in wide rows. A layer's time is that of memory traffic::

    hidden = x Lᵀ, y = hidden Uᵀ                     one launch: reads x, writes y
    ∂hidden = G U, ∂Uᵀ = hiddenᵀ G                   one pass over G
    ∂x = ∂hidden L, ∂L = ∂hiddenᵀ x                  one pass over x, writes ∂x

y and ∂x are written, not added to: the frozen layer's own product then adds itself to them, in float32 and
with one rounding, without another pass. What many programs add up they write side by side, and one more
launch sums it in a fixed order: results do not change from run to run.
"""

from functools import partial
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.gates import Gates, logits_gradient, softmax_parts, weight
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.thin.plan import CHUNK, ThinPlan

#: Entries that a program of the sum over shares takes, and parts that one of the last step takes at once.
_SIZE, _TERMS = 512, 64


@triton.jit  # type: ignore[untyped-decorator]
def product(a, b, total, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + a @ b``; Triton's interpreter would take bfloat16 factors for whole numbers."""
    kind: tl.constexpr = tl.float32 if UPCAST else a.dtype
    return tl.dot(a.to(kind), b.to(kind), total, input_precision="tf32x3")


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(pointer, i, j, rows, columns, stride, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows i and columns j of a matrix, zeros beyond its end; FULL: there are none."""
    at = pointer + i[:, None].to(tl.int64) * stride + j[None, :]
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(at) if FULL else tl.load(at, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(pointer, tile, i, j, rows, columns, stride, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores what :func:`load_tile` loads."""
    at = pointer + i[:, None].to(tl.int64) * stride + j[None, :]
    if FULL:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(i < rows)[:, None] & (j < columns)[None, :])


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    out, hidden, x, thin, tokens, m, n,
    R: tl.constexpr, PADDED: tl.constexpr, WRITE: tl.constexpr, ADD: tl.constexpr, FULL: tl.constexpr,
    UPCAST: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Hidden numbers, (T, R), and the update, (T, m), of some tokens; reference: ``down`` and ``add_up_``.

    WRITE: the update is asked for.
    """
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    r = tl.arange(0, PADDED)
    total = tl.zeros((TOKENS, PADDED), tl.float32)
    for first in range(0, n, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        tile = load_tile(x, t, j, tokens, n, n, FULL)
        down = load_tile(thin, r, j, R, n, n, FULL)
        total = product(tile, tl.trans(down), total, UPCAST)
    numbers = total.to(x.dtype.element_ty)
    store_tile(hidden, numbers, t, r, tokens, R, R, FULL)
    if WRITE:
        up = thin + R * n
        for first in range(0, m, COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            if ADD:
                y = load_tile(out, t, j, tokens, m, m, FULL).to(tl.float32)
            else:
                y = tl.zeros((TOKENS, COLUMNS), tl.float32)
            y = product(numbers, load_tile(up, r, j, R, m, m, FULL), y, UPCAST)
            store_tile(out, y.to(out.dtype.element_ty), t, j, tokens, m, m, FULL)


@triton.jit(do_not_specialize=["tokens", "times"])  # type: ignore[untyped-decorator]
def _outputs_kernel(  # type: ignore[no-untyped-def]
    hidden_parts, up_parts, grad, hidden, thin, rows, tokens, times, m, n, share, kept,
    R: tl.constexpr, PADDED: tl.constexpr, AGAIN: tl.constexpr, FULL: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of ∂L/∂hidden over a share of the columns and of ∂L/∂Uᵀ over TOKENS tokens so many times."""
    r = tl.arange(0, PADDED)
    low = tl.load(rows + 8 * R + r, mask=r < R, other=0)[:, None]
    high = tl.load(rows + 9 * R + r, mask=r < R, other=0)[:, None]
    at = tl.load(rows + 11 * R + r, mask=r < R, other=0)[:, None]
    begin = tl.program_id(1) * share
    to_hidden = hidden_parts + tl.program_id(1).to(tl.int64) * tokens * R
    to_up = up_parts + tl.program_id(0).to(tl.int64) * kept
    for time in range(times):
        t = (tl.program_id(0) * times + time) * TOKENS + tl.arange(0, TOKENS)
        numbers = load_tile(hidden, t, r, tokens, R, R, FULL)
        flat = tl.trans(numbers)  # (R, T)
        total = tl.zeros((TOKENS, PADDED), tl.float32)
        for first in range(begin, tl.minimum(begin + share, m), COLUMNS):
            j = first + tl.arange(0, COLUMNS)
            g = load_tile(grad, t, j, tokens, m, m, FULL)
            up = load_tile(thin + R * n, r, j, R, m, m, FULL)
            total = product(g, tl.trans(up), total, UPCAST)
            sums = tl.zeros((PADDED, COLUMNS), tl.float32)
            sums = product(flat, g, sums, UPCAST)
            j = j[None, :]
            met = (j >= low) & (j < high) & (j < m)
            if AGAIN:
                sums += tl.load(to_up + at + j, mask=met & (j * 0 + time > 0), other=0.0)
            tl.store(to_up + at + j, sums, mask=met)
        store_tile(to_hidden, total, t, r, tokens, R, R, FULL)


@triton.jit(do_not_specialize=["size", "parts"])  # type: ignore[untyped-decorator]
def _sum_kernel(out, summands, size, parts, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Adds up so many vectors of ``size`` entries."""
    i = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    total = tl.zeros((SIZE,), tl.float32)
    for _ in range(parts):
        total += tl.load(summands + i, mask=i < size, other=0.0)
        summands += size
    tl.store(out + i, total.to(out.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["tokens", "share"])  # type: ignore[untyped-decorator]
def _inputs_kernel(  # type: ignore[no-untyped-def]
    grad_x, down_parts, x, grad_hidden, thin, rows, tokens, n, share, kept,
    R: tl.constexpr, PADDED: tl.constexpr, WRITE: tl.constexpr, ADD: tl.constexpr, FULL: tl.constexpr,
    UPCAST: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Some columns of ∂L/∂x, and their sums of ∂L/∂L over a share of the tokens."""
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    r = tl.arange(0, PADDED)
    down = load_tile(thin, r, j, R, n, n, FULL)
    total = tl.zeros((PADDED, COLUMNS), tl.float32)
    begin = tl.program_id(1) * share
    for first in range(begin, tl.minimum(begin + share, tokens), TOKENS):
        t = first + tl.arange(0, TOKENS)
        back = load_tile(grad_hidden, t, r, tokens, R, R, FULL)
        tile = load_tile(x, t, j, tokens, n, n, FULL)
        total = product(tl.trans(back), tile, total, UPCAST)
        if WRITE:
            if ADD:
                dx = load_tile(grad_x, t, j, tokens, n, n, FULL).to(tl.float32)
            else:
                dx = tl.zeros((TOKENS, COLUMNS), tl.float32)
            dx = product(back, down, dx, UPCAST)
            store_tile(grad_x, dx.to(grad_x.dtype.element_ty), t, j, tokens, n, n, FULL)
    r, j = r[:, None], j[None, :]
    n_a = tl.load(rows + R + r, mask=r < R, other=0)
    n_b = tl.load(rows + 2 * R + r, mask=r < R, other=1)
    q = tl.load(rows + 3 * R + r, mask=r < R, other=-1)
    at = tl.load(rows + 10 * R + r, mask=r < R, other=0)
    met = (j % n_b == q) & (j < n_a * n_b) & (j < n)
    tl.store(down_parts + tl.program_id(1).to(tl.int64) * kept + at + j, total, mask=met)


@triton.jit(do_not_specialize=["down_splits", "up_splits"])  # type: ignore[untyped-decorator]
def _finish_kernel(  # type: ignore[no-untyped-def]
    grad_left, grad_right, grad_values, dots, down_parts, up_parts, right, values, scaling, work,
    down_splits, up_splits, down_kept, up_kept, m, n,
    COMPONENTS: tl.constexpr, COMPONENTS_PADDED: tl.constexpr, GATING: tl.constexpr, ZERO: tl.constexpr,
    TERMS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of the gradients of one stretch of packed entries; dots: those of <dB / w, B>.

    ZERO: the gate of a single component is 1 whatever its logit is. References: ``up_backward`` and
    ``down_backward`` of :mod:`moka_pl.ops.thin`.
    """
    item = work + tl.program_id(0) * 9
    side, component, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    left = side == 0
    m_a, n_a, m_b, n_b = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5), tl.load(item + 6)
    packed, begin = tl.load(item + 7), tl.load(item + 8)
    highest, sum_ = softmax_parts(values, COMPONENTS, COMPONENTS_PADDED, GATING)
    scale = weight(values, component, scaling, highest, sum_, GATING)
    e = first + tl.arange(0, CHUNK)
    real = e < tl.where(left, m_a * n_a, m_b * n_b)
    on_right = real & (e * 0 + side == 1)
    # Left entry (a, p) sums over q, what is kept in (a, p, q); right entry (b, q) over a, in (a, q, b). Right
    # entries come in the order of what is kept, (q, b), so that neighbours lie side by side.
    entry = packed + tl.where(left, e, e % m_b * n_b + e // m_b)
    entries = tl.load(right + entry, mask=on_right, other=0.0)
    at = (begin + tl.where(left, e * n_b, e))[:, None]
    column = tl.where(left, e % n_a * n_b, e % m_b)[:, None]
    step, column_step = tl.where(left, 1, n_b * m_b), tl.where(left, 1, m_b)
    limit = tl.where(left, n, m)
    splits = tl.where(left, down_splits, up_splits)
    parts = up_parts
    if left:
        parts = down_parts
    kept = tl.where(left, down_kept, up_kept).to(tl.int64)
    terms = splits * tl.where(left, n_b, m_a)
    # Entries come first, as neighbouring threads take those of the first axis, and these lie side by side.
    total = tl.zeros((CHUNK, TERMS), tl.float32)
    for term in tl.range(0, terms, TERMS, loop_unroll_factor=4):
        number = (term + tl.arange(0, TERMS))[None, :]
        k = number // splits
        met = (number < terms) & real[:, None] & (column + k * column_step < limit)
        total += tl.load(parts + (number % splits * kept + k * step + at), mask=met, other=0.0)
    sums = tl.sum(total, 1)
    tl.store(grad_left + entry, sums, mask=real & (e * 0 + side == 0))
    tl.store(grad_right + entry, sums * scale, mask=on_right)
    tl.store(dots + tl.program_id(0), tl.sum(sums * entries, 0))
    if ZERO:
        tl.store(grad_values, 0.0)


@triton.jit  # type: ignore[untyped-decorator]
def _weights_kernel(  # type: ignore[no-untyped-def]
    grad_values, dots, counts, values, scaling,
    R: tl.constexpr, PADDED: tl.constexpr, GATING: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The gradient of the gate logits from the parts of <dB / w, B>; reference: ``logits_gradient``."""
    c = tl.arange(0, PADDED)
    real = c < R
    first, count = tl.load(counts + c, mask=real, other=0), tl.load(counts + R + c, mask=real, other=0)
    sums = tl.zeros((PADDED, CHUNK), tl.float32)
    for start in range(0, tl.max(count, 0), CHUNK):
        part = start + tl.arange(0, CHUNK)
        met = real[:, None] & (part[None, :] < count[:, None])
        sums += tl.load(dots + first[:, None] + part[None, :], mask=met, other=0.0)
    grad = logits_gradient(tl.sum(sums, 1), values, scaling, R, PADDED, GATING)
    tl.store(grad_values + c, grad, mask=real)


def thin_forward(plan: ThinPlan, x: Tensor, thin: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes the update, (T, m), and its hidden numbers, (T, R).

    Args:
        plan: The layer's plan.
        x: Input, shape (T, n), contiguous.
        thin: L and Uᵀ (see :func:`moka_pl.ops.triton.thin.matrices.thin_matrices`), in the dtype of x.
        out: What to add the update to in place, shape (T, m), contiguous; None for the update alone.
    """
    add = out is not None
    if out is None:
        out = x.new_empty(x.shape[0], plan.plan.m)
    return out, _forward(plan, x, thin, out, add)


def thin_hidden(plan: ThinPlan, x: Tensor, thin: Tensor) -> Tensor:
    """Computes the hidden numbers of :func:`thin_forward` alone, (T, R).

    Args:
        plan: The layer's plan.
        x: Input, shape (T, n), contiguous.
        thin: L and Uᵀ, in the dtype of x.
    """
    return _forward(plan, x, thin, None, False)


def _forward(plan: ThinPlan, x: Tensor, thin: Tensor, out: Tensor | None, add: bool) -> Tensor:
    """Returns the hidden numbers, and writes the update to ``out`` or adds it there."""
    tokens, m, n = x.shape[0], plan.plan.m, plan.plan.n
    grids, write = plan.grids(tokens, x.itemsize), out is not None
    tile, full = grids.forward, grids.full[0]
    hidden = x.new_empty(tokens, plan.hidden)
    to = x if out is None else out
    launch(
        _forward_kernel, plan.compiled, ("forward", x.dtype, write, add, full),
        (-(-tokens // tile.tokens), 1, 1), (x, to),
        (to, hidden, x, thin, tokens, m, n, plan.hidden, plan.padded, write, add, full, not x.is_cuda,
         tile.tokens, tile.columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return hidden


class Parts(NamedTuple):
    """Parts of the gradients of L and Uᵀ, which :func:`thin_factor_gradients` adds up.

    Attributes:
        down: Parts of ∂L/∂L, (splits, kept entries).
        up: Parts of ∂L/∂Uᵀ, likewise.
    """

    down: Tensor
    up: Tensor


def thin_backward(
    plan: ThinPlan,
    grad: Tensor,
    x: Tensor,
    hidden: Tensor,
    thin: Tensor,
    needs_x: bool,
    total: Tensor | None = None,
) -> tuple[Tensor | None, Parts]:
    """Returns the update's share of the gradient of x, (T, n), and parts of the gradients of L and Uᵀ.

    Args:
        plan: The layer's plan.
        grad: G, shape (T, m), contiguous.
        x: Input, shape (T, n), contiguous.
        hidden: Hidden numbers, shape (T, R).
        thin: L and Uᵀ.
        needs_x: Whether the gradient of x is needed.
        total: What is added to in place to make it, (T, n), contiguous; None for nothing.
    """
    tokens, m, n = x.shape[0], plan.plan.m, plan.plan.n
    grids, numbers = plan.grids(tokens, x.itemsize), hidden.numel()
    empty = partial(torch.empty, dtype=torch.float32, device=x.device)
    hidden_parts = empty(grids.shares * numbers)
    parts = Parts(empty(grids.stretches, plan.kept[0]), empty(grids.blocks, plan.kept[1]))
    tile, full, again, upcast = grids.outputs, grids.full[1], grids.times > 1, not x.is_cuda
    launch(
        _outputs_kernel, plan.compiled, ("outputs", x.dtype, full, grids.columns, again),
        (grids.blocks, grids.shares, 1), (grad,),
        (hidden_parts, parts.up, grad, hidden, thin, plan.rows, tokens, grids.times, m, n, grids.columns,
         plan.kept[1], plan.hidden, plan.padded, again, full, upcast, tile.tokens, tile.columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    grad_hidden = torch.empty_like(hidden)
    launch(
        _sum_kernel, plan.compiled, ("sum", x.dtype), (-(-numbers // _SIZE), 1, 1), (grad,),
        (grad_hidden, hidden_parts, numbers, grids.shares, _SIZE), num_warps=4,
    )  # fmt: skip
    grad_x = total if total is not None else torch.empty_like(x) if needs_x else None
    tile, full, add = grids.inputs, grids.full[2], total is not None
    launch(
        _inputs_kernel, plan.compiled, ("inputs", x.dtype, needs_x, add, full),
        (-(-n // tile.columns), grids.stretches, 1), (x,),
        (x if grad_x is None else grad_x, parts.down, x, grad_hidden, thin, plan.rows, tokens, n,
         grids.tokens, plan.kept[0], plan.hidden, plan.padded, needs_x, add, full, upcast,
         tile.tokens, tile.columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad_x, parts


def thin_factor_gradients(
    plan: ThinPlan, parts: Parts, right: Tensor, gates: Gates, needs_gates: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of the packed factors and, where needed, of ``gates.values``.

    Args:
        plan: The layer's plan.
        parts: What :func:`thin_backward` has returned.
        right: Packed right factors, float32.
        gates: The weights w.
        needs_gates: Whether the gradient of ``gates.values`` is needed.
    """
    values, scaling, gating = gates
    programs = plan.work.shape[0]
    grad_left, grad_right = right.new_empty(plan.left_size), torch.empty_like(right)
    grad_values, dots = torch.empty_like(values), right.new_empty(programs)
    components = len(plan.plan.shapes), plan.plan.padded
    alone = components[0] == 1 and gating == "softmax"
    launch(
        _finish_kernel, plan.compiled, ("finish", gating), (programs, 1, 1), (right, values),
        (grad_left, grad_right, grad_values, dots, *parts, right, values, scaling, plan.work,
         parts.down.shape[0], parts.up.shape[0], *plan.kept, plan.plan.m, plan.plan.n, *components, gating,
         alone, _TERMS, CHUNK),
        num_warps=8,
    )  # fmt: skip
    if needs_gates and not alone:
        launch(
            _weights_kernel, plan.compiled, ("weights", gating), (1, 1, 1), (values,),
            (grad_values, dots, plan.counts, values, scaling, *components, gating, CHUNK), num_warps=4,
        )  # fmt: skip
    return grad_left, grad_right, grad_values if needs_gates else None
