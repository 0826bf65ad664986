"""W + ΔW of components that are thin, added to W where that is dequantised.

Row b of the right factors and the m_a rows of the left ones make m_a rows of ΔW::

    ΔW[a m_b + b, p n_b + q] = Σ_c w_c A_c[a, p] B_c[b, q]

An entry takes one multiply-add a component. Of the eight entries of a word, n_b lie side by side that meet
one left entry, and all its right entries are those of the whole row.

Reference: :func:`moka_pl.ops.dense.add_delta_`, rounded by
:func:`moka_pl.ops.triton.reference.round_by_thresholds`.
"""

import triton
import triton.language as tl

from moka_pl.ops.triton.delta import add_frozen
from moka_pl.ops.triton.dequantise import entries, scales
from moka_pl.ops.triton.gates import softmax_parts, weight

#: Rows of right factors that a program takes one after another.
STEPS = 4


@triton.jit  # type: ignore[untyped-decorator]
def _lefts(  # type: ignore[no-untyped-def]
    left, word, inside, M_A: tl.constexpr, N_A: tl.constexpr, PARTS: tl.constexpr, COUNT: tl.constexpr
):
    """The left entries that words of a row meet: PARTS of each row a and component, each (WORDS,)."""
    found = ()
    for a in tl.static_range(M_A):
        for c in tl.static_range(COUNT):
            for part in tl.static_range(PARTS):
                at = left + (c * M_A + a) * N_A + word * PARTS + part
                found = found + (tl.load(at, mask=inside, other=0.0),)  # type: ignore[assignment]  # noqa: RUF005
    return found


@triton.jit  # type: ignore[untyped-decorator]
def merged_rows(  # type: ignore[no-untyped-def]
    out, left, right, values, scaling, data, absmax, code, outer_code, outer_absmax, offset, program,
    M_A: tl.constexpr, N_A: tl.constexpr, M_B: tl.constexpr, N_B: tl.constexpr, COUNT: tl.constexpr,
    COMPONENTS_PADDED: tl.constexpr, GATING: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    PAIRWISE: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """WORDS words of the rows of W + ΔW that meet STEPS rows of right factors."""
    WIDTH: tl.constexpr = N_A * N_B // 8
    PARTS: tl.constexpr = 8 // N_B
    STRIPES: tl.constexpr = (WIDTH + WORDS - 1) // WORDS
    kind: tl.constexpr = out.dtype.element_ty
    word = program % STRIPES * WORDS + tl.arange(0, WORDS)
    here = word < WIDTH
    k = tl.arange(0, 8)[None, :]
    column = word[:, None] * 8 + k
    highest, sum_ = softmax_parts(values, COUNT, COMPONENTS_PADDED, GATING)
    lefts = _lefts(left, word, here, M_A, N_A, PARTS, COUNT)
    for step in range(STEPS):
        b = program // STRIPES * STEPS + step
        inside = here & (word * 0 + b < M_B)
        held = tl.minimum(b, M_B - 1)
        # All rows are under way before the first is stored.
        numbers = ()
        largest = ()
        for a in tl.static_range(M_A):
            i = (a * M_B + b) * WIDTH + word
            numbers = numbers + (tl.load(data + i, mask=inside, other=0),)  # type: ignore[assignment]  # noqa: RUF005
            scale = scales(absmax, outer_code, outer_absmax, offset, i, inside, BLOCKSIZE, NESTED)
            largest = largest + (scale,)  # type: ignore[assignment]  # noqa: RUF005
        rights = ()
        for c in tl.static_range(COUNT):
            w = weight(values, c, scaling, highest, sum_, GATING)
            at = right + (c * M_B + held) * N_B
            entry = tl.load(at) + tl.zeros((1, 8), tl.float32)
            for q in tl.static_range(1, N_B):
                entry = tl.where(k % N_B == q, tl.load(at + q), entry)
            rights = rights + (entry * w,)  # type: ignore[assignment]  # noqa: RUF005
        for a in tl.static_range(M_A):
            total = tl.zeros((WORDS, 8), tl.float32)
            for c in tl.static_range(COUNT):
                entry = tl.broadcast_to(lefts[(a * COUNT + c) * PARTS][:, None], (WORDS, 8))
                for part in tl.static_range(1, PARTS):
                    entry = tl.where(k // N_B == part, lefts[(a * COUNT + c) * PARTS + part][:, None], entry)
                total = tl.fma(entry, tl.broadcast_to(rights[c], (WORDS, 8)), total)
            row = a * M_B + b
            number = entries(numbers[a], largest[a], code)
            rounded = add_frozen(total, number, row, column, kind, kind == tl.bfloat16, PAIRWISE)
            tl.store(out + row.to(tl.int64) * (WIDTH * 8) + column, rounded, mask=inside[:, None])
