"""A gradient with respect to ΔW projected to the packed factors and the weights, in two launches.

Reference: :func:`moka_pl.ops.dense.project`.

For D = ∂L/∂ΔW and a component with pair index t = (a, p) and entry index e = (b, q):
    dA[t] = w Σ_e D[a m_b + b, p n_b + q] B[e],   dB[e] = w Σ_t D[…] A[t],   dw = Σ_e (dB[e] / w) B[e]
Components of one shape see the same rearranged D, so that both sums are matrix products over D's tiles, with
the members as columns. In half precision each factor goes in as two numbers, its rounding and the rest: the
products then have about 16 bits, more than D itself.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.gates import Gates, logits_gradient, softmax_parts, weight
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.plan import CHUNK, ENTRIES, MEMBERS, PAIRS, TERMS, Plan


@triton.jit  # type: ignore[untyped-decorator]
def _halves(value, second, LOW: tl.constexpr, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value rounded, in columns of the first kind, and what the rounding left, in those of the second."""
    rounded = value.to(DTYPE)
    rest = value - rounded.to(tl.float32) if LOW else tl.zeros_like(value)
    return tl.where(second, rest.to(DTYPE), rounded)


@triton.jit  # type: ignore[untyped-decorator]
def add_product(a, b, total, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + a @ b``; Triton's interpreter would take bfloat16 factors for whole numbers."""
    kind: tl.constexpr = tl.float32 if UPCAST else a.dtype
    return tl.dot(a.to(kind), b.to(kind), total, input_precision="ieee")


@triton.jit  # type: ignore[untyped-decorator]
def _project_kernel(  # type: ignore[no-untyped-def]
    parts, grad, left, right, tiles, m, n, left_size, right_size, begin_right, begin_weights,
    EXACT: tl.constexpr, WHOLE: tl.constexpr, LOW: tl.constexpr, UPCAST: tl.constexpr, SPLITS: tl.constexpr,
    ENTRIES: tl.constexpr, PAIRS: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Sums of ∂L/∂A, ∂L/∂B and ∂L/∂w over a share of D, without w; reference: ``project`` (see above)."""
    tile = tiles + tl.program_id(0) * (8 + 2 * MEMBERS)
    m_a, n_a, m_b, n_b = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    identity, start = tl.load(tile + 4), tl.load(tile + 5)
    number, wide = tl.load(tile + 6), tl.load(tile + 7)
    split = tl.program_id(1)
    column = tl.arange(0, 2 * MEMBERS)
    second = column >= MEMBERS
    lefts = tl.load(tile + 8 + column % MEMBERS)
    rights = tl.load(tile + 8 + MEMBERS + column % MEMBERS)
    used = rights >= 0
    member = tl.arange(0, MEMBERS)
    member_left, member_right = tl.load(tile + 8 + member), tl.load(tile + 8 + MEMBERS + member)
    known = member_right >= 0
    dtype: tl.constexpr = grad.dtype.element_ty

    e = start + tl.arange(0, ENTRIES)
    b, q = e // n_b, e % n_b
    held = e < m_b * n_b
    value = tl.load(right + rights[None, :] + e[:, None], mask=held[:, None] & used[None, :], other=0.0)
    entries = _halves(value, second[None, :], LOW, dtype)  # (ENTRIES, 2 MEMBERS)
    total = tl.zeros((2 * MEMBERS, ENTRIES), tl.float32)
    # With an identity on the left only the diagonal pairs (a, a) count, each with weight 1.
    pairs = tl.where(identity != 0, tl.minimum(m_a, n_a), m_a * n_a)
    share = tl.cdiv(tl.cdiv(pairs, SPLITS), PAIRS) * PAIRS
    stop = tl.minimum((split + 1) * share, pairs)
    for first in range(split * share, stop, PAIRS):
        t = first + tl.arange(0, PAIRS)
        real = t < stop
        a = tl.where(identity != 0, t, t // n_a)
        p = tl.where(identity != 0, t, t % n_a)
        if EXACT:
            # Everything divides: no masks, and stretches of 8 entries lie side by side, for wide loads.
            corner = tl.multiple_of(a * m_b * n + p * n_b, 8)
            within = tl.max_contiguous(tl.multiple_of(b * n + q, 8), 8)
            d = tl.load(grad + (corner[:, None] + within[None, :]))  # (PAIRS, ENTRIES)
        else:
            row = a[:, None] * m_b + b[None, :]
            d_column = p[:, None] * n_b + q[None, :]
            inside = real[:, None] & held[None, :]
            if not WHOLE:
                inside = inside & (row < m) & (d_column < n)
            if wide != 0:
                # Nothing ends within 8 entries. A mask of its own: the other branch must not take the hint.
                whole = tl.max_constancy(inside & (row >= 0), [1, 8])
                flat = tl.max_contiguous(tl.multiple_of(row * n + d_column, [1, 8]), [1, 8])
                d = tl.load(grad + flat, mask=whole, other=0.0)
            else:
                d = tl.load(grad + row * n + d_column, mask=inside, other=0.0)
        keep = real[None, :] & used[:, None]
        alone = (t * 0 + identity != 0)[None, :]
        scale = tl.load(left + lefts[:, None] + t[None, :], mask=keep & (alone == 0), other=0.0)
        scale = tl.where(keep & alone, 1.0, scale)  # (2 MEMBERS, PAIRS)
        total = add_product(_halves(scale, second[:, None], LOW, dtype), d, total, UPCAST)
        if identity == 0:
            sums = tl.zeros((PAIRS, 2 * MEMBERS), tl.float32)
            sums = add_product(d, entries, sums, UPCAST)  # (PAIRS, 2 MEMBERS)
            at = number.to(tl.int64) * left_size + member_left[None, :] + t[:, None]
            sums = tl.sum(tl.reshape(sums, (PAIRS, 2, MEMBERS)), 1)  # (PAIRS, MEMBERS)
            tl.store(parts + at, sums, mask=real[:, None] & known[None, :])
    sums_right = tl.sum(tl.reshape(total, (2, MEMBERS, ENTRIES)), 0)  # (MEMBERS, ENTRIES)
    keep = known[:, None] & held[None, :]
    entry = member_right[:, None] + e[None, :]
    tl.store(parts + begin_right + split.to(tl.int64) * right_size + entry, sums_right, mask=keep)
    product = tl.sum(sums_right * tl.load(right + entry, mask=keep, other=0.0), 1)  # (MEMBERS,)
    tl.store(parts + begin_weights + (tl.program_id(0) * SPLITS + split) * MEMBERS + member, product)


@triton.jit  # type: ignore[untyped-decorator]
def _finish_kernel(  # type: ignore[no-untyped-def]
    grad_left, grad_right, grad_values, parts, values, scaling, chunks, dots, programs,
    left_size, right_size, begin_right, begin_weights,
    R: tl.constexpr, PADDED: tl.constexpr, GATING: tl.constexpr, CHUNK: tl.constexpr, MEMBERS: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Adds up the sums of ``_project_kernel``, times w, and takes ∂L/∂w back to the gate logits.

    References: :func:`moka_pl.ops.dense.project`, :func:`moka_pl.ops.gating.logits_gradient`.
    """
    program = tl.program_id(0)
    highest, sum_ = softmax_parts(values, R, PADDED, GATING)
    if program == programs:  # the last one: the weights' gradients, all components at once
        c = tl.arange(0, PADDED)
        real = c < R
        first, count = tl.load(dots + c, mask=real, other=0), tl.load(dots + R + c, mask=real, other=0)
        sums = tl.zeros((PADDED, CHUNK), tl.float32)
        for start in range(0, tl.max(count, 0), CHUNK):
            part = start + tl.arange(0, CHUNK)
            index = begin_weights + first[:, None] + part[None, :] * MEMBERS
            sums += tl.load(parts + index, mask=real[:, None] & (part[None, :] < count[:, None]), other=0.0)
        grad = logits_gradient(tl.sum(sums, 1), values, scaling, R, PADDED, GATING)  # (PADDED,)
        tl.store(grad_values + c, grad, mask=real)
    else:
        chunk = chunks + program * 5
        side, component, at = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2)
        size, number = tl.load(chunk + 3), tl.load(chunk + 4)
        k = tl.arange(0, CHUNK)
        begin = tl.where(side == 1, begin_right, 0) + at
        stride = tl.where(side == 1, right_size, left_size)
        total = tl.zeros((TERMS, CHUNK), tl.float32)
        for start in range(0, number, TERMS):  # so many loads are under way at once
            term = start + tl.arange(0, TERMS)[:, None]
            met = (term < number) & (k < size)[None, :]
            total += tl.load(parts + begin + term.to(tl.int64) * stride + k[None, :], mask=met, other=0.0)
        total = tl.sum(total, 0)
        total *= weight(values, component, scaling, highest, sum_, GATING)
        tl.store(grad_left + at + k, total, mask=(k < size) & (k * 0 + side == 0))
        tl.store(grad_right + at + k, total, mask=(k < size) & (k * 0 + side == 1))


def fused_projection(
    plan: Plan, grad: Tensor, left: Tensor, right: Tensor, gates: Gates
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects D = ∂L/∂ΔW to the gradients of ``left``, ``right`` and ``gates.values``.

    Args:
        plan: The layer's plan.
        grad: D, shape (m, n), contiguous.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
    """
    tiles, splits = len(plan.tiles), plan.splits
    sizes = left.numel(), right.numel()
    # Sums over parts: left entries of every tile, right entries of every split, weights of every program.
    # Every entry that is read is written before: each tile writes its pairs, each split its entries.
    begin_right = plan.most * sizes[0]
    begin_weights = begin_right + splits * sizes[1]
    parts = torch.empty(begin_weights + tiles * splits * MEMBERS, dtype=torch.float32, device=right.device)
    begins = (begin_right, begin_weights)
    launch(
        _project_kernel, plan.compiled, ("project", grad.dtype), (tiles, splits, 1), (left, right, grad),
        (parts, grad, left, right, plan.tiles, plan.m, plan.n, *sizes, *begins,
         plan.exact, plan.whole, grad.dtype != torch.float32, not grad.is_cuda,
         splits, ENTRIES, PAIRS, MEMBERS),
        num_warps=2, num_stages=4,
    )  # fmt: skip
    return finish(plan, plan.chunks, plan.dots, parts, left, right, gates, (*sizes, *begins))


def finish(
    plan: Plan,
    chunks: Tensor,
    dots: Tensor,
    parts: Tensor,
    left: Tensor,
    right: Tensor,
    gates: Gates,
    places: tuple[int, int, int, int],
    members: int = MEMBERS,
) -> tuple[Tensor, Tensor, Tensor]:
    """Adds up sums over parts to the gradients of ``left``, ``right`` and ``gates.values``.

    Args:
        plan: The layer's plan.
        chunks: Stretches of gradients, and the number of their parts, as :attr:`Plan.chunks`.
        dots: Parts of the weights' gradients, as :attr:`Plan.dots`.
        parts: The sums, without the weights, float32: of left entries, right entries, and weights.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
        places: Numbers of left and of right entries, and where right entries and weights begin in ``parts``.
        members: From one part of a weight's gradient to the next.
    """
    values, scaling, gating = gates
    grads = torch.empty_like(left), torch.empty_like(right), torch.empty_like(values)
    launch(
        _finish_kernel, plan.compiled, ("finish", len(chunks), *places, gating),
        (len(chunks) + 1, 1, 1), (values,),
        (*grads, parts, values, scaling, chunks, dots, len(chunks), *places,
         len(plan.shapes), plan.padded, gating, CHUNK, members, TERMS),
        num_warps=4,
    )  # fmt: skip
    return grads
