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

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.gates import Gates, logits_gradient, softmax_parts, weight
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.thin_plan import CHUNK, ThinPlan, Tile
from moka_pl.ops.triton.thin_tiles import load_tile, product, store_tile

#: Programs that keep a large GPU busy, twice over.
_PROGRAMS = 264
#: Entries that a program of the sum over shares takes, and parts that one of the last step takes at once.
_SIZE, _SPLITS = 512, 64


#: The tiles of the forward pass, the pass over G and that over x.
FORWARD, OUTPUTS, INPUTS = Tile(32, 128, 4, 6), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _forward_kernel(  # type: ignore[no-untyped-def]
    out, hidden, x, thin, tokens, m, n,
    R: tl.constexpr, PADDED: tl.constexpr, ADD: tl.constexpr, FULL: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Hidden numbers, (T, R), and the update, (T, m), of some tokens; reference: ``down`` and ``add_up_``."""
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
    hidden_parts, up_parts, grad, hidden, thin, tokens, times, m, n, block, share,
    R: tl.constexpr, PADDED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, FULL: tl.constexpr,
    UPCAST: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums of ∂L/∂hidden over a share of the columns and of ∂L/∂Uᵀ over TOKENS tokens so many times."""
    r = tl.arange(0, PADDED)
    begin = tl.program_id(1) * share
    to_hidden = hidden_parts + tl.program_id(1).to(tl.int64) * tokens * R
    to_up = up_parts + tl.program_id(0).to(tl.int64) * (PADDED // A) * m
    k = tl.arange(0, PADDED // A)
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
            if A > 1:  # of every row only one a counts
                met = (r // B % A)[:, None] == (j // block)[None, :]
                sums = tl.reshape(tl.where(met, sums, 0.0), (PADDED // (A * B), A, B * COLUMNS))
                sums = tl.reshape(tl.sum(sums, 1), (PADDED // A, COLUMNS))
            if time > 0:
                sums += load_tile(to_up, k, j, PADDED // A, m, m, FULL)
            store_tile(to_up, sums, k, j, PADDED // A, m, m, FULL)
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
    grad_x, down_parts, x, grad_hidden, thin, tokens, n, share,
    R: tl.constexpr, PADDED: tl.constexpr, B: tl.constexpr, WRITE: tl.constexpr, FULL: tl.constexpr,
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
            dx = tl.zeros((TOKENS, COLUMNS), tl.float32)
            dx = product(back, down, dx, UPCAST)
            store_tile(grad_x, dx.to(grad_x.dtype.element_ty), t, j, tokens, n, n, FULL)
    if B > 1:  # of every column only one q counts
        met = (r % B)[:, None] == (j % B)[None, :]
        total = tl.sum(tl.reshape(tl.where(met, total, 0.0), (PADDED // B, B, COLUMNS)), 1)
    to = down_parts + tl.program_id(1).to(tl.int64) * (PADDED // B) * n
    store_tile(to, total, tl.arange(0, PADDED // B), j, PADDED // B, n, n, FULL)


@triton.jit  # type: ignore[untyped-decorator]
def _add_splits(  # type: ignore[no-untyped-def]
    total, parts, at, met, splits, size, SPLITS: tl.constexpr
):
    """Adds the splits of ``parts`` at some indices to ``total``, (SPLITS, CHUNK)."""
    for first in range(0, splits, SPLITS):
        split = (first + tl.arange(0, SPLITS)).to(tl.int64)[:, None]
        taken = (split < splits) & met[None, :]
        total += tl.load(parts + split * size + at[None, :], mask=taken, other=0.0)
    return total


@triton.jit  # type: ignore[untyped-decorator]
def _add_left(  # type: ignore[no-untyped-def]
    total, parts, e, k, begin, m_a, n_a, n_b, n, splits,
    PADDED: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds the parts of ∂L/∂L at left entries e and q = k."""
    row = (begin + e // n_a * n_b + k) // B
    column = e % n_a * n_b + k
    met = (e < m_a * n_a) & (column < n)
    return _add_splits(total, parts, row * n + column, met, splits, PADDED // B * n, SPLITS)


@triton.jit  # type: ignore[untyped-decorator]
def _add_right(  # type: ignore[no-untyped-def]
    total, parts, e, k, begin, m_b, n_b, m, splits,
    PADDED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds the parts of ∂L/∂Uᵀ at right entries e and a = k."""
    row = begin + k * n_b + e % n_b
    row = row // (A * B) * B + row % B
    column = k * m_b + e // n_b
    met = (e < m_b * n_b) & (column < m)
    return _add_splits(total, parts, row * m + column, met, splits, PADDED // A * m, SPLITS)


@triton.jit(do_not_specialize=["down_splits", "up_splits"])  # type: ignore[untyped-decorator]
def _finish_kernel(  # type: ignore[no-untyped-def]
    grad_left, grad_right, dots, down_parts, up_parts, right, values, scaling, work, components,
    down_splits, up_splits, m, n,
    PADDED: tl.constexpr, A: tl.constexpr, B: tl.constexpr, COMPONENTS: tl.constexpr,
    COMPONENTS_PADDED: tl.constexpr, GATING: tl.constexpr, SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of the gradients of one stretch of packed entries; dots: those of <dB / w, B>.

    References: ``up_backward`` and ``down_backward`` of :mod:`moka_pl.ops.thin`.
    """
    item = work + tl.program_id(0) * 3
    side, component, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    part = components + component * 7
    m_a, n_a, m_b, n_b = tl.load(part), tl.load(part + 1), tl.load(part + 2), tl.load(part + 3)
    begin, left_at, right_at = tl.load(part + 4), tl.load(part + 5), tl.load(part + 6)
    e = first + tl.arange(0, CHUNK)
    sums = tl.zeros((SPLITS, CHUNK), tl.float32)
    if side == 0:
        if A * B > 1:  # known when compiling: all loads at once
            for k in tl.static_range(B):
                sums = _add_left(
                    sums, down_parts, e, k, begin, m_a, n_a, n_b, n, down_splits, PADDED, B, SPLITS
                )
        else:
            for k in range(n_b):
                sums = _add_left(
                    sums, down_parts, e, k, begin, m_a, n_a, n_b, n, down_splits, PADDED, B, SPLITS
                )
        tl.store(grad_left + left_at + e, tl.sum(sums, 0), mask=e < m_a * n_a)
    else:
        if A * B > 1:
            for k in tl.static_range(A):
                sums = _add_right(sums, up_parts, e, k, begin, m_b, n_b, m, up_splits,
                                  PADDED, A, B, SPLITS)  # fmt: skip
        else:
            for k in range(m_a):
                sums = _add_right(sums, up_parts, e, k, begin, m_b, n_b, m, up_splits,
                                  PADDED, A, B, SPLITS)  # fmt: skip
        total = tl.sum(sums, 0)
        real = e < m_b * n_b
        highest, sum_ = softmax_parts(values, COMPONENTS, COMPONENTS_PADDED, GATING)
        scale = weight(values, component, scaling, highest, sum_, GATING)
        tl.store(grad_right + right_at + e, total * scale, mask=real)
        entries = tl.load(right + right_at + e, mask=real, other=0.0)
        tl.store(dots + tl.program_id(0), tl.sum(total * entries, 0))


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
        thin: L and Uᵀ (see :func:`moka_pl.ops.triton.thin_factors.thin_factors`), in the dtype of x.
        out: What to add the update to in place, shape (T, m), contiguous; None for the update alone.
    """
    tokens, m, n = len(x), plan.plan.m, plan.plan.n
    add = out is not None
    if out is None:
        out = x.new_empty(tokens, m)
    hidden = x.new_empty(tokens, plan.hidden)
    tile = plan.fit(FORWARD, x.element_size())
    full = plan.full(tile.columns, m, n) and tokens % tile.tokens == 0
    launch(
        _forward_kernel, plan.compiled, ("forward", x.dtype, add, full, tile),
        (-(-tokens // tile.tokens), 1, 1), (x, out),
        (out, hidden, x, thin, tokens, m, n, plan.hidden, plan.padded, add, full, not x.is_cuda,
         tile.tokens, tile.columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, hidden


def thin_outputs_backward(
    plan: ThinPlan, grad: Tensor, hidden: Tensor, thin: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns the gradient of the hidden numbers, (T, R), and parts of that of Uᵀ.

    Args:
        plan: The layer's plan.
        grad: G, shape (T, m), contiguous.
        hidden: Hidden numbers, shape (T, R).
        thin: L and Uᵀ.
    """
    tokens, m, n = len(grad), plan.plan.m, plan.plan.n
    tile, (a, b) = plan.fit(OUTPUTS, grad.element_size()), plan.early
    full = plan.full(tile.columns, m) and tokens % tile.tokens == 0
    blocks, stripes = -(-tokens // tile.tokens), -(-m // tile.columns)
    # Parts of ∂L/∂Uᵀ are to take a quarter of the memory of G at most.
    most = max(16, tokens * grad.element_size() * a // (16 * plan.padded))
    times = -(-blocks // min(blocks, most, 64))
    blocks = -(-blocks // times)
    full = full and tokens == blocks * times * tile.tokens
    share = -(-stripes // max(1, min(stripes, _PROGRAMS // blocks))) * tile.columns
    shares = -(-m // share)
    block = plan.plan.shapes[0].m_b
    hidden_parts = grad.new_empty(shares, tokens, plan.hidden, dtype=torch.float32)
    up_parts = grad.new_empty(blocks, plan.padded // a, m, dtype=torch.float32)
    launch(
        _outputs_kernel, plan.compiled, ("outputs", grad.dtype, full, tile, share), (blocks, shares, 1),
        (grad,),
        (hidden_parts, up_parts, grad, hidden, thin, tokens, times, m, n, block, share,
         plan.hidden, plan.padded, a, b, full, not grad.is_cuda, tile.tokens, tile.columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    grad_hidden = torch.empty_like(hidden)
    launch(
        _sum_kernel, plan.compiled, ("sum", hidden.dtype), (-(-hidden.numel() // _SIZE), 1, 1), (grad,),
        (grad_hidden, hidden_parts, hidden.numel(), shares, _SIZE), num_warps=4,
    )  # fmt: skip
    return grad_hidden, up_parts


def thin_inputs_backward(
    plan: ThinPlan, x: Tensor, grad_hidden: Tensor, thin: Tensor, needs_x: bool
) -> tuple[Tensor | None, Tensor]:
    """Returns the gradient of x, (T, n), without the frozen layer's share, and parts of that of L.

    Args:
        plan: The layer's plan.
        x: Input, shape (T, n), contiguous.
        grad_hidden: Gradient of the hidden numbers, shape (T, R).
        thin: L and Uᵀ.
        needs_x: Whether the gradient of x is needed.
    """
    tokens, n = x.shape
    tile, b = plan.fit(INPUTS, x.element_size()), plan.early[1]
    full = plan.full(tile.columns, n) and tokens % tile.tokens == 0
    blocks, stripes = -(-tokens // tile.tokens), -(-n // tile.columns)
    share = -(-blocks // max(1, min(blocks, 2 * _PROGRAMS // stripes))) * tile.tokens
    shares = -(-tokens // share)
    grad_x = torch.empty_like(x) if needs_x else None
    parts = x.new_empty(shares, plan.padded // b, n, dtype=torch.float32)
    launch(
        _inputs_kernel, plan.compiled, ("inputs", x.dtype, needs_x, full, tile), (stripes, shares, 1), (x,),
        (x if grad_x is None else grad_x, parts, x, grad_hidden, thin, tokens, n, share,
         plan.hidden, plan.padded, b, needs_x, full, not x.is_cuda, tile.tokens, tile.columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return grad_x, parts


def thin_factor_gradients(
    plan: ThinPlan, down_parts: Tensor, up_parts: Tensor, right: Tensor, gates: Gates, needs_gates: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns the gradients of the packed factors and, where needed, of ``gates.values``.

    Args:
        plan: The layer's plan.
        down_parts: Parts of the gradient of L.
        up_parts: Parts of the gradient of Uᵀ.
        right: Packed right factors, float32.
        gates: The weights w.
        needs_gates: Whether the gradient of ``gates.values`` is needed.
    """
    values, scaling, gating = gates
    grad_left, grad_right = right.new_empty(plan.left_size), torch.empty_like(right)
    dots = right.new_empty(len(plan.work))
    components = len(plan.plan.shapes), plan.plan.padded
    launch(
        _finish_kernel, plan.compiled, ("finish", gating), (len(plan.work), 1, 1), (right, values),
        (grad_left, grad_right, dots, down_parts, up_parts, right, values, scaling, plan.work, plan.parts,
         len(down_parts), len(up_parts), plan.plan.m, plan.plan.n, plan.padded, *plan.early, *components,
         gating, _SPLITS, CHUNK),
        num_warps=4,
    )  # fmt: skip
    if not needs_gates:
        return grad_left, grad_right, None
    if gating == "softmax" and components[0] == 1:  # w = s
        return grad_left, grad_right, torch.zeros_like(values)
    grad_values = torch.empty_like(values)
    launch(
        _weights_kernel, plan.compiled, ("weights", gating), (1, 1, 1), (values,),
        (grad_values, dots, plan.counts, values, scaling, *components, gating, CHUNK), num_warps=4,
    )  # fmt: skip
    return grad_left, grad_right, grad_values
