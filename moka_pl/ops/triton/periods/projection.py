"""A gradient with respect to ΔW projected to factors and weights, read once for components of all shapes.

Reference: :func:`moka_pl.ops.dense.project`.

A tile of D, (pairs, entries), as :mod:`moka_pl.ops.triton.periods.plan` says, gives shares of the gradients
of the left entries at its pairs and of the right ones at its entries, for all components of a group::

    ∂A += D B,  (pairs, members)         ∂B += Aᵀ D,  (members, entries)

In half precision each factor goes in as two numbers, its rounding and the rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.gates import Gates
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.periods.plan import MEMBERS, PAIRS, PeriodPlan
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.projection import add_product, finish

#: How a program is compiled.
OPTIONS = {"num_warps": 4, "num_stages": 3}


@triton.jit  # type: ignore[untyped-decorator]
def halves(value, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """The value rounded, and what the rounding left."""
    rounded = value.to(DTYPE)
    return rounded, (value - rounded.to(tl.float32)).to(DTYPE)


@triton.jit  # type: ignore[untyped-decorator]
def _project_kernel(  # type: ignore[no-untyped-def]
    parts, grad, left, right, table, n, right_size, begin_right, begin_weights, pairs,
    ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr,
    SPLITS: tl.constexpr, PAIRS: tl.constexpr, MEMBERS: tl.constexpr, EXACT: tl.constexpr,
    LOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Shares of ∂L/∂A, ∂L/∂B and ∂L/∂w, without w, of a tile and of some of its pairs.

    Periods of ROWS × COLUMNS, ACROSS of them side by side; the tile's entries are DOWN × WIDE.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    top, begin = tile // (COLUMNS // WIDE) * DOWN, tile % (COLUMNS // WIDE) * WIDE
    dtype: tl.constexpr = grad.dtype.element_ty

    c = tl.arange(0, MEMBERS)
    known, n_b = tl.load(table + c) >= 0, tl.load(table + MEMBERS + c)
    down, across = tl.load(table + 2 * MEMBERS + c), tl.load(table + 3 * MEMBERS + c)
    places = table + (4 + 4 * tile) * MEMBERS + c
    left_at, right_at = tl.load(places), tl.load(places + MEMBERS)
    to_left = parts + tl.load(places + 2 * MEMBERS)
    to_right = parts + begin_right + split.to(tl.int64) * right_size + tl.load(places + 3 * MEMBERS)

    e = tl.arange(0, DOWN * WIDE)
    row, column = e // WIDE, e % WIDE
    entry = row[:, None] * n_b[None, :] + column[:, None]  # (entries, MEMBERS)
    factor = tl.load(right + right_at[None, :] + entry, mask=known[None, :] & (entry >= 0), other=0.0)
    high, low = halves(factor, dtype)
    within = tl.max_contiguous(tl.multiple_of(row * n + column, 8), 8)
    total = tl.zeros((MEMBERS, DOWN * WIDE), tl.float32)
    share = tl.cdiv(tl.cdiv(pairs, SPLITS), PAIRS) * PAIRS
    stop = tl.minimum((split + 1) * share, pairs)
    for first in range(split * share, stop, PAIRS):
        t = first + tl.arange(0, PAIRS)
        u, v = t // ACROSS, t % ACROSS
        corner = tl.multiple_of((u * ROWS + top) * n + v * COLUMNS + begin, 8)
        at = grad + (corner[:, None] + within[None, :])
        step = u[None, :] * down[:, None] + v[None, :] * across[:, None]  # (MEMBERS, PAIRS)
        real = known[:, None] & (t < stop)[None, :]
        inside = (t < stop)[:, None] & (e >= 0)[None, :]
        d = tl.load(at) if EXACT else tl.load(at, mask=inside, other=0.0)  # (PAIRS, entries)
        scale = tl.load(left + left_at[:, None] + step, mask=real, other=0.0)
        scale_high, scale_low = halves(scale, dtype)
        total = add_product(scale_high, d, total, UPCAST)
        sums = tl.zeros((MEMBERS, PAIRS), tl.float32)
        sums = add_product(tl.trans(high), tl.trans(d), sums, UPCAST)
        if LOW:
            total = add_product(scale_low, d, total, UPCAST)
            sums = add_product(tl.trans(low), tl.trans(d), sums, UPCAST)
        tl.store(to_left[:, None] + step, sums, mask=real)
    # Nothing is added, which the compiler does not know: it would keep all these numbers during the loop.
    e += tl.minimum(stop, 0)
    entry = (e // WIDE)[None, :] * n_b[:, None] + (e % WIDE)[None, :]  # (MEMBERS, entries)
    kept = known[:, None] & (entry >= 0)
    tl.store(to_right[:, None] + entry, total, mask=kept)
    values = tl.load(right + right_at[:, None] + entry, mask=kept, other=0.0)
    product = tl.sum(total * values, 1)  # (MEMBERS,)
    tl.store(parts + begin_weights + (tile * SPLITS + split) * MEMBERS + c, product)


def project_by_periods(
    plan: Plan, periods: PeriodPlan, grad: Tensor, left: Tensor, right: Tensor, gates: Gates
) -> tuple[Tensor, Tensor, Tensor]:
    """Projects D = ∂L/∂ΔW to the gradients of ``left``, ``right`` and ``gates.values``.

    Args:
        plan: The layer's plan.
        periods: The groups of its components.
        grad: D, shape (m, n), contiguous.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
    """
    sizes = left.numel(), right.numel()
    begin_right = periods.left * sizes[0]
    begin_weights = begin_right + periods.right * sizes[1]
    parts = torch.empty(periods.parts, dtype=torch.float32, device=right.device)
    groups = zip(periods.groups, periods.tables, periods.places, strict=True)
    for i, (group, table, place) in enumerate(groups):
        across = plan.n // group.columns
        pairs = plan.m // group.rows * across
        launch(
            _project_kernel, plan.compiled, ("periods", i, grad.dtype), (group.tiles, group.splits, 1),
            (left, right, grad),
            (parts, grad, left, right, table, plan.n, sizes[1], begin_right, begin_weights + place, pairs,
             across, group.rows, group.columns, *group.tile, group.splits, PAIRS, MEMBERS,
             pairs % (PAIRS * group.splits) == 0, grad.dtype != torch.float32, not grad.is_cuda),
            **OPTIONS,
        )  # fmt: skip
    places = (*sizes, begin_right, begin_weights)
    return finish(plan, periods.chunks, periods.dots, parts, left, right, gates, places, MEMBERS)
