"""ΔW = Σ_i w_i (A_i ⊗ B_i) in one launch, alone or added to a frozen weight.

Reference: :func:`moka_pl.ops.dense.add_delta_`.
"""

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.base_weight import WeightSource, frozen_arguments, frozen_weight
from moka_pl.ops.triton.dequantise import as_words, can_dequantise, entries, scales
from moka_pl.ops.triton.gates import Gates, softmax_parts, weight
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.plan import TILE, Plan


@triton.jit
def _mixed(i, j):  # type: ignore[no-untyped-def]
    """Numbers of 32 bits for rows i and columns j, whose upper halves are the thresholds of rounding."""
    row = i.to(tl.uint32) * 0x9E3779B1
    row = (row ^ (row >> 15)) * 0x85EBCA77
    column = j.to(tl.uint32) * 0xC2B2AE3D
    column = (column ^ (column >> 13)) * 0x27D4EB2F
    return (row ^ column) * 0x9E3779B1


@triton.jit  # type: ignore[untyped-decorator]
def round_sum(total, i, j, DTYPE: tl.constexpr, DITHER: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rounds to DTYPE; reference: :func:`moka_pl.ops.triton.reference.round_by_thresholds`."""
    rounded = total.to(DTYPE)
    if DITHER:
        high = (total.to(tl.uint32, bitcast=True) + (_mixed(i, j) >> 16)) >> 16
        # A NaN must not overflow into a number.
        rounded = tl.where(total == total, high.to(tl.uint16).to(DTYPE, bitcast=True), rounded)
    return rounded


#: Of two entries at once: W's to bfloat16, plus ΔW's, plus the thresholds, and the upper halves of both. The
#: minimum keeps thresholds from turning a NaN into a number. Pairs are converted at twice the rate.
_ROUND_PAIR = tl.constexpr("""{
.reg .b32 p, x, y;
.reg .f32 f, g;
cvt.rn.bf16x2.f32 p, $4, $3;
shl.b32 x, p, 16;
and.b32 y, p, 0xffff0000;
mov.b32 f, x;
mov.b32 g, y;
add.rn.f32 f, f, $1;
add.rn.f32 g, g, $2;
mov.b32 x, f;
mov.b32 y, g;
min.s32 x, x, 0x7fff0000;
min.s32 y, y, 0x7fff0000;
shr.u32 p, $5, 16;
add.u32 x, x, p;
shr.u32 p, $6, 16;
add.u32 y, y, p;
prmt.b32 $0, x, y, 0x7632;
}""")


@triton.jit  # type: ignore[untyped-decorator]
def add_frozen(  # type: ignore[no-untyped-def]
    total, number, i, j, DTYPE: tl.constexpr, DITHER: tl.constexpr, PAIRWISE: tl.constexpr
):
    """W + ΔW of rows i and columns j in DTYPE: W's entries, unrounded, and ΔW's, float32.

    DITHER: with thresholds, to bfloat16. PAIRWISE: by instructions of NVIDIA's GPUs, with the same result.
    """
    if DITHER and PAIRWISE:
        parts = [total, number, _mixed(i, j)]
        rounded = tl.inline_asm_elementwise(
            _ROUND_PAIR, "=r,f,f,f,f,r,r", parts, dtype=tl.bfloat16, is_pure=True, pack=2
        )
    else:
        rounded = round_sum(number.to(DTYPE).to(tl.float32) + total, i, j, DTYPE, DITHER)
    return rounded


@cache
def rounds_pairwise(device: torch.device) -> bool:
    """Whether a GPU has the instructions of :func:`add_frozen`."""
    nvidia = device.type == "cuda" and torch.version.hip is None
    return nvidia and torch.cuda.get_device_capability(device) >= (8, 0)


@triton.jit  # type: ignore[untyped-decorator]
def _put_words(  # type: ignore[no-untyped-def]
    out, total, i, j, inside, n, data, absmax, code, outer_code, outer_absmax, offset,
    WORDWISE: tl.constexpr, READ: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    DITHER: tl.constexpr, PAIRWISE: tl.constexpr,
):  # fmt: skip
    """Adds W to eight entries a word of a row of ΔW, (WORDS, 8), rounds and stores them."""
    word = i * (n // 8) + j // 8
    flat = word[:, None] * 8 + tl.arange(0, 8)[None, :]
    kind: tl.constexpr = out.dtype.element_ty
    column = j[:, None] + tl.arange(0, 8)[None, :]
    if WORDWISE:
        numbers = tl.load(data + word, mask=inside, other=0)
        largest = scales(absmax, outer_code, outer_absmax, offset, word, inside, BLOCKSIZE, NESTED)
        rounded = add_frozen(total, entries(numbers, largest, code), i, column, kind, DITHER, PAIRWISE)
    else:
        if READ:
            held = tl.where(inside[:, None], flat, 0)
            run = tl.where(inside, word * 8, 0)[:, None]
            total += frozen_weight(
                data, absmax, code, outer_code, outer_absmax, offset, held, run, kind, BLOCKSIZE, NESTED
            )
        rounded = round_sum(total, i, column, kind, DITHER)
    tl.store(out + flat, rounded, mask=inside[:, None])


@triton.jit
def _add_product(at, met, value, total):  # type: ignore[no-untyped-def]
    """Adds left entries times values, in one instruction each whatever else is not fused."""
    entry = tl.load(at, mask=met, other=0.0)
    return tl.fma(tl.broadcast_to(entry, value.shape), value, total)


@triton.jit  # type: ignore[untyped-decorator]
def _words_kernel(  # type: ignore[no-untyped-def]
    out, left, right, values, scaling, data, absmax, code, outer_code, outer_absmax, offset, m, n,
    left_step, right_step,
    COMPONENTS: tl.constexpr, ALIGNED: tl.constexpr, R: tl.constexpr, PADDED: tl.constexpr,
    GATING: tl.constexpr, PERIOD: tl.constexpr, REPEATS: tl.constexpr, WORDS: tl.constexpr,
    WORDWISE: tl.constexpr, READ: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    DITHER: tl.constexpr, PAIRWISE: tl.constexpr,
):  # fmt: skip
    """W + ΔW or ΔW, (m, n), by words of eight entries; reference: :func:`moka_pl.ops.dense.add_delta_`.

    Where 8 divides n_b, the entries of a word meet one entry of the left factor, and entries of the right
    factor that lie side by side. Rows PERIOD apart, a multiple of every m_b, need the same right entries,
    which are read once for all REPEATS. The third programs are those of several adapters.
    """
    adapter = tl.program_id(2)
    out += adapter.to(tl.int64) * m * n
    left += adapter * left_step
    right += adapter * right_step
    values += adapter * R
    top = tl.program_id(0) % PERIOD + tl.program_id(0) // PERIOD * (REPEATS * PERIOD)
    j = (tl.program_id(1) * WORDS + tl.arange(0, WORDS)) * 8
    row = top + tl.zeros_like(j)
    inside = (j < n) & (row < m)  # of the last periods a layer may have some rows only
    in_1, in_2, in_3 = row < m - PERIOD, row < m - 2 * PERIOD, row < m - 3 * PERIOD
    k = tl.arange(0, 8)[None, :]
    highest, sum_ = softmax_parts(values, R, PADDED, GATING)
    total_0 = tl.zeros((WORDS, 8), tl.float32)
    total_1 = total_0
    total_2 = total_0
    total_3 = total_0
    for c in tl.static_range(R):
        n_a = COMPONENTS[6 * c + 1]
        m_b = COMPONENTS[6 * c + 2]
        n_b = COMPONENTS[6 * c + 3]
        scale = weight(values, c, scaling, highest, sum_, GATING)
        begin = COMPONENTS[6 * c + 5] + top % m_b * n_b
        entry = left + COMPONENTS[6 * c + 4] + top // m_b * n_a
        step = PERIOD // m_b * n_a
        if ALIGNED[c]:
            place = tl.multiple_of(begin + j % n_b, 8)[:, None] + k  # (WORDS, 8)
            entry += (j // n_b)[:, None]  # (WORDS, 1)
            held = inside[:, None]
        else:
            place = begin + (j[:, None] + k) % n_b
            entry += (j[:, None] + k) // n_b  # (WORDS, 8)
            held = inside[:, None] & (k < 8)  # as wide as entry
        value = tl.load(right + place, mask=inside[:, None], other=0.0) * scale
        total_0 = _add_product(entry, held, value, total_0)
        if REPEATS > 1:
            total_1 = _add_product(entry + step, held & in_1[:, None], value, total_1)
            total_2 = _add_product(entry + 2 * step, held & in_2[:, None], value, total_2)
            total_3 = _add_product(entry + 3 * step, held & in_3[:, None], value, total_3)
    _put_words(out, total_0, top, j, inside, n, data, absmax, code, outer_code, outer_absmax, offset,
               WORDWISE, READ, BLOCKSIZE, NESTED, DITHER, PAIRWISE)  # fmt: skip
    if REPEATS > 1:
        top += PERIOD
        _put_words(out, total_1, top, j, inside & in_1, n, data, absmax, code, outer_code, outer_absmax,
                   offset, WORDWISE, READ, BLOCKSIZE, NESTED, DITHER, PAIRWISE)  # fmt: skip
        top += PERIOD
        _put_words(out, total_2, top, j, inside & in_2, n, data, absmax, code, outer_code, outer_absmax,
                   offset, WORDWISE, READ, BLOCKSIZE, NESTED, DITHER, PAIRWISE)  # fmt: skip
        top += PERIOD
        _put_words(out, total_3, top, j, inside & in_3, n, data, absmax, code, outer_code, outer_absmax,
                   offset, WORDWISE, READ, BLOCKSIZE, NESTED, DITHER, PAIRWISE)  # fmt: skip


@triton.jit  # type: ignore[untyped-decorator]
def _cells_kernel(  # type: ignore[no-untyped-def]
    out, left, right, values, scaling, data, absmax, code, outer_code, outer_absmax, offset,
    cells, rows, columns, m, n, left_step, right_step,
    R: tl.constexpr, PADDED: tl.constexpr, GATING: tl.constexpr, IDENTITY: tl.constexpr,
    WHOLE: tl.constexpr, EVEN: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    READ: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, DITHER: tl.constexpr,
):  # fmt: skip
    """W + ΔW or ΔW, (m, n), for any shapes; reference: :func:`moka_pl.ops.dense.add_delta_`.

    Tables say where each row and column lies in the packed factors, -1 beyond their end. WHOLE: no component
    ends early. EVEN: tiles fill the layer, and BN divides the runs that share a scale. The third programs are
    those of several adapters.
    """
    adapter = tl.program_id(2)
    out += adapter.to(tl.int64) * m * n
    left += adapter * left_step
    right += adapter * right_step
    values += adapter * R
    cell = cells + tl.program_id(0) * 3
    i = tl.load(cell) + tl.arange(0, BM)
    j = tl.load(cell + 1) + tl.arange(0, BN)
    touched = tl.load(cell + 2)
    in_rows, in_columns = i < m, j < n
    inside = in_rows[:, None] & in_columns[None, :]
    if EVEN:
        run = tl.multiple_of(i * n + tl.load(cell + 1), 16)[:, None]
        flat = run + tl.arange(0, BN)[None, :]
    else:
        flat = tl.where(inside, i[:, None] * n + j[None, :], 0)
        run = flat
    total = tl.zeros((BM, BN), tl.float32)
    if touched != 0:
        highest, sum_ = softmax_parts(values, R, PADDED, GATING)
        for c in tl.static_range(R):
            row_left = tl.load(rows + (2 * c) * m + i, mask=in_rows, other=-1)
            row_right = tl.load(rows + (2 * c + 1) * m + i, mask=in_rows, other=0)
            column_left = tl.load(columns + (2 * c) * n + j, mask=in_columns, other=-1)
            column_right = tl.load(columns + (2 * c + 1) * n + j, mask=in_columns, other=0)
            met = inside
            if not WHOLE:
                met = (row_left >= 0)[:, None] & (column_left >= 0)[None, :]
            scale = weight(values, c, scaling, highest, sum_, GATING)
            if IDENTITY:
                met = met & (row_left[:, None] == column_left[None, :])
            else:
                scale = scale * tl.load(
                    left + (row_left[:, None] + column_left[None, :]), mask=met, other=0.0
                )
            value = tl.load(right + (row_right[:, None] + column_right[None, :]), mask=met, other=0.0)
            total += scale * value
    if READ:
        total += frozen_weight(
            data, absmax, code, outer_code, outer_absmax, offset, flat, run,
            out.dtype.element_ty, BLOCKSIZE, NESTED,
        )  # fmt: skip
    rounded = round_sum(total, i[:, None], j[None, :], out.dtype.element_ty, DITHER)
    if EVEN:
        tl.store(out + flat, rounded)
    else:
        tl.store(out + flat, rounded, mask=inside)


def fused_weight(
    plan: Plan,
    left: Tensor,
    right: Tensor,
    gates: Gates,
    dtype: torch.dtype,
    source: WeightSource | None = None,
) -> Tensor:
    """Builds ``ΔW = Σ_i w_i (A_i ⊗ B_i)``, (m, n), or ``W + ΔW`` from a frozen weight, in one launch.

    Sums run in float32 and are rounded once. Each entry of W is what its own dequantisation rounds it to in
    ``dtype``. In bfloat16 ``W + ΔW`` is rounded with a threshold that differs from entry to entry, so that
    small updates are kept on average; where ΔW is zero the result is W bit for bit.

    Args:
        plan: The layer's plan.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
        dtype: Result dtype; with a frozen weight bfloat16 or float32.
        source: The frozen weight; None for ΔW alone.
    """
    out = torch.empty(plan.m, plan.n, dtype=dtype, device=right.device)
    return _build(plan, out, left, right, gates, source, 1)


def fused_weights(
    plan: Plan, left: Tensor, right: Tensor, weights: Tensor, dtype: torch.dtype, source: WeightSource | None
) -> Tensor:
    """As :func:`fused_weight` for K adapters in one launch, shape (K, m, n).

    Args:
        plan: The layer's plan.
        left: Packed left factors, (K, entries), contiguous, float32.
        right: Packed right factors, likewise.
        weights: w, (K, r), likewise.
        dtype: Result dtype; with a frozen weight bfloat16 or float32.
        source: The frozen weight; None for ΔW alone.
    """
    out = torch.empty(len(right), plan.m, plan.n, dtype=dtype, device=right.device)
    return _build(plan, out, left, right, Gates(weights), source, len(right))


def _build(
    plan: Plan,
    out: Tensor,
    left: Tensor,
    right: Tensor,
    gates: Gates,
    source: WeightSource | None,
    adapters: int,
) -> Tensor:
    """Writes the weights of some adapters one after another into ``out`` and returns that.

    Args:
        plan: The layer's plan.
        out: The result.
        left: Packed left factors.
        right: Packed right factors.
        gates: The weights w.
        source: The frozen weight; None for ΔW alone.
        adapters: Their number.
    """
    dtype = out.dtype
    steps = (0, 0) if adapters == 1 else (left.shape[1], right.shape[1])
    frozen_pointers, blocksize, nested = frozen_arguments(source, right)
    data, absmax = frozen_pointers[:2]
    read = source is not None
    dither = read and dtype is torch.bfloat16
    values, scaling, gating = gates
    pointers = (left, right, values, scaling, *frozen_pointers)
    outside = (right, left, values, data, absmax)
    key = (dtype, gating, data.dtype, blocksize, nested, steps)
    frozen = (read, blocksize, nested, dither)
    r = len(plan.shapes)
    # Without fused multiply-adds: the two roundings of the dequantisation are bitsandbytes' own.
    if plan.words:
        wordwise = can_dequantise(source, plan.m * plan.n)
        if wordwise:
            pointers = (left, right, values, scaling, *as_words(frozen_pointers))
        period, repeats, words = plan.words
        grid = (-(-plan.m // (period * repeats)) * period, -(-plan.n // (8 * words)), adapters)
        launch(
            _words_kernel, plan.compiled, ("words", read, wordwise, *key), grid, outside,
            (out, *pointers, plan.m, plan.n, *steps, plan.components, plan.aligned, r, plan.padded, gating,
             period, repeats, words, wordwise, *frozen, rounds_pairwise(out.device)),
            num_warps=words // 32, enable_fp_fusion=False,
        )  # fmt: skip
    else:
        assert plan.cells is not None
        even = plan.even and blocksize % TILE[1] == 0
        launch(
            _cells_kernel, plan.compiled, ("cells", read, *key), (len(plan.cells), 1, adapters), outside,
            (out, *pointers, plan.cells, plan.rows, plan.columns, plan.m, plan.n, *steps, r, plan.padded,
             gating, plan.shapes[0].identity, plan.whole, even, *TILE, *frozen),
            num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return out
