"""W + ΔW by matrix products of the vectors of left and of right entries that tiles are made of.

Reference: :func:`moka_pl.ops.dense.add_delta_`; rounded as :mod:`moka_pl.ops.triton.delta` does.

A tile of ΔW, (pairs, entries), is ``A Bᵀ`` over the components of a group (see
:mod:`moka_pl.ops.triton.periods.plan`). Each factor goes in as two bfloat16 numbers, its rounding and the
rest.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.base_weight import WeightSource, frozen_arguments
from moka_pl.ops.triton.delta import add_frozen, rounds_pairwise
from moka_pl.ops.triton.dequantise import as_words, entries, scales
from moka_pl.ops.triton.gates import Gates, softmax_parts, weight
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.periods.plan import MEMBERS, PeriodPlan
from moka_pl.ops.triton.periods.projection import halves
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.projection import add_product

#: Periods of rows that a program takes at once, shares that those of columns are split into, and its options.
PAIRS, SPLITS, OPTIONS = 16, 2, {"num_warps": 4, "num_stages": 2}


@triton.jit  # type: ignore[untyped-decorator]
def _build_kernel(  # type: ignore[no-untyped-def]
    out, left, right, values, scaling, data, absmax, code, outer_code, outer_absmax, offset, table, n, below,
    ACROSS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DOWN: tl.constexpr, WIDE: tl.constexpr,
    SPLITS: tl.constexpr, PAIRS: tl.constexpr, MEMBERS: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr,
    GATING: tl.constexpr, UPCAST: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    PAIRWISE: tl.constexpr,
):  # fmt: skip
    """W + ΔW of a tile in PAIRS periods of rows and a share of those of columns.

    ACROSS periods of ROWS × COLUMNS lie side by side, and ``below`` above each other.
    """
    tile = tl.program_id(0)
    top, begin = tile // (COLUMNS // WIDE) * DOWN, tile % (COLUMNS // WIDE) * WIDE
    kind: tl.constexpr = out.dtype.element_ty
    c = tl.arange(0, MEMBERS)
    component, n_b = tl.load(table + c), tl.load(table + MEMBERS + c)
    known = component >= 0
    highest, sum_ = softmax_parts(values, R, PADDED, GATING)
    scale = weight(values, tl.maximum(component, 0), scaling, highest, sum_, GATING)  # (MEMBERS,)
    down, across = tl.load(table + 2 * MEMBERS + c), tl.load(table + 3 * MEMBERS + c)
    places = table + (4 + 4 * tile) * MEMBERS + c
    left_at, right_at = tl.load(places), tl.load(places + MEMBERS)
    e = tl.arange(0, DOWN * WIDE)
    entry = right_at[:, None] + (e // WIDE)[None, :] * n_b[:, None] + (e % WIDE)[None, :]
    factor = tl.load(right + entry, mask=known[:, None] & (entry >= 0), other=0.0)
    high, low = halves(factor * scale[:, None], kind)  # (MEMBERS, entries)
    # A program stays in its rows, whose places and thresholds are the same in every period of columns.
    u = tl.program_id(1) * PAIRS + tl.arange(0, PAIRS)
    left_entry = left_at[None, :] + u[:, None] * down[None, :]  # (PAIRS, MEMBERS)
    met = (u < below)[:, None] & known[None, :]
    k = tl.arange(0, PAIRS * DOWN * WIDE // 8)  # words of eight entries
    inner = k % (DOWN * WIDE // 8) * 8
    own = tl.program_id(1) * PAIRS + k // (DOWN * WIDE // 8)
    i, inside = own * ROWS + top + inner // WIDE, own < below
    share = tl.cdiv(ACROSS, SPLITS)
    first = tl.program_id(2) * share
    for v in range(first, tl.minimum(first + share, ACROSS)):
        j = v * COLUMNS + begin + inner % WIDE
        word = i * (n // 8) + j // 8
        numbers = tl.load(data + word, mask=inside, other=0)
        largest = scales(absmax, outer_code, outer_absmax, offset, word, inside, BLOCKSIZE, NESTED)
        lefts = tl.load(left + (left_entry + v * across[None, :]), mask=met, other=0.0)
        high_left, low_left = halves(lefts, kind)
        total = tl.zeros((PAIRS, DOWN * WIDE), tl.float32)
        total = add_product(low_left, high, total, UPCAST)
        total = add_product(high_left, low, total, UPCAST)
        total = add_product(high_left, high, total, UPCAST)
        total = tl.reshape(total, (PAIRS * DOWN * WIDE // 8, 8))
        column = j[:, None] + tl.arange(0, 8)[None, :]
        flat = word[:, None] * 8 + tl.arange(0, 8)[None, :]
        number = entries(numbers, largest, code)
        rounded = add_frozen(total, number, i[:, None], column, kind, True, PAIRWISE)
        tl.store(out + flat, rounded, mask=inside[:, None])


def weight_by_periods(
    plan: Plan, periods: PeriodPlan, left: Tensor, right: Tensor, gates: Gates, source: WeightSource
) -> Tensor:
    """Builds ``W + ΔW``, (m, n), in bfloat16, as :func:`moka_pl.ops.triton.delta.fused_weight`.

    Args:
        plan: The layer's plan.
        periods: Its components, all in one group.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
        source: A frozen weight of 4 bits that :func:`moka_pl.ops.triton.dequantise.can_dequantise`.
    """
    (group,), (table,) = periods.groups, periods.tables
    out = torch.empty(plan.m, plan.n, dtype=torch.bfloat16, device=right.device)
    pointers, blocksize, nested = frozen_arguments(source, right)
    below, across = plan.m // group.rows, plan.n // group.columns
    launch(
        _build_kernel, plan.compiled, ("build", gates.gating, blocksize, nested),
        (group.tiles, -(-below // PAIRS), SPLITS),
        (right, left, gates.values, *pointers[:2]),
        (out, left, right, *gates[:2], *as_words(pointers), table, plan.n, below, across,
         group.rows, group.columns, *group.tile, SPLITS, PAIRS, MEMBERS, len(plan.shapes), plan.padded,
         gates.gating, not out.is_cuda, blocksize, nested, rounds_pairwise(out.device)),
        **OPTIONS, enable_fp_fusion=False,
    )  # fmt: skip
    return out
