"""What the thin products multiply with, filled in by one launch: L and Uᵀ, and W or W + ΔW beside them.

References: ``lora_left`` and ``lora_right`` of :mod:`moka_pl.ops.thin`, and
:func:`moka_pl.backbone.quantization.dense_weight`, bit for bit.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.base_weight import WeightSource, frozen_arguments
from moka_pl.ops.triton.delta import rounds_pairwise
from moka_pl.ops.triton.dequantise import as_words, dequantise_words
from moka_pl.ops.triton.gates import Gates, softmax_parts, weight
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.plan import WORDS
from moka_pl.ops.triton.thin.merged import STEPS, merged_rows
from moka_pl.ops.triton.thin.plan import COLUMNS, ThinPlan


@triton.jit  # type: ignore[untyped-decorator]
def _fill_down(  # type: ignore[no-untyped-def]
    thin, left, rows, n, program, R: tl.constexpr, PADDED: tl.constexpr, COLUMNS: tl.constexpr
):
    """COLUMNS columns of L, (R, n)."""
    r = tl.arange(0, PADDED)[:, None]
    real = r < R
    j = (program * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    begin = tl.load(rows + r, mask=real, other=0)
    n_a = tl.load(rows + R + r, mask=real, other=0)
    n_b = tl.load(rows + 2 * R + r, mask=real, other=1)
    q = tl.load(rows + 3 * R + r, mask=real, other=0)
    p = j // n_b
    met = (j - p * n_b == q) & (p < n_a) & (j < n)
    value = tl.load(left + begin + p, mask=met, other=0.0)
    tl.store(thin + r * n + j, value.to(thin.dtype.element_ty), mask=real & (j < n))


@triton.jit  # type: ignore[untyped-decorator]
def _fill_up(  # type: ignore[no-untyped-def]
    thin, right, values, scaling, rows, m, program,
    R: tl.constexpr, PADDED: tl.constexpr, COMPONENTS: tl.constexpr, COMPONENTS_PADDED: tl.constexpr,
    GATING: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """COLUMNS columns of Uᵀ, (R, m)."""
    r = tl.arange(0, PADDED)[:, None]
    real = r < R
    j = (program * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    n_b = tl.load(rows + 2 * R + r, mask=real, other=1)
    a = tl.load(rows + 4 * R + r, mask=real, other=-1)
    begin = tl.load(rows + 5 * R + r, mask=real, other=0)
    m_b = tl.load(rows + 6 * R + r, mask=real, other=1)
    component = tl.load(rows + 7 * R + r, mask=real, other=0)
    highest, sum_ = softmax_parts(values, COMPONENTS, COMPONENTS_PADDED, GATING)
    scale = weight(values, component, scaling, highest, sum_, GATING)
    i = j // m_b
    value = tl.load(right + begin + (j - i * m_b) * n_b, mask=(i == a) & (j < m), other=0.0) * scale
    tl.store(thin + r * m + j, value.to(thin.dtype.element_ty), mask=real & (j < m))


@triton.jit  # type: ignore[untyped-decorator]
def _fill_kernel(  # type: ignore[no-untyped-def]
    w, thin, left, right, values, scaling, rows, data, absmax, code, outer_code, outer_absmax, offset,
    stripes, programs, size, m, n,
    R: tl.constexpr, PADDED: tl.constexpr, COMPONENTS: tl.constexpr, COMPONENTS_PADDED: tl.constexpr,
    GATING: tl.constexpr, READ: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    MERGED: tl.constexpr, OWN: tl.constexpr, PAIRWISE: tl.constexpr,
    COLUMNS: tl.constexpr, STEPS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """L by the first programs, Uᵀ by the next, W or W + ΔW by the others."""
    program = tl.program_id(0)
    if program < stripes:
        _fill_down(thin, left, rows, n, program, R, PADDED, COLUMNS)
    elif program < programs:
        _fill_up(thin + R * n, right, values, scaling, rows, m, program - stripes,
                 R, PADDED, COMPONENTS, COMPONENTS_PADDED, GATING, COLUMNS)  # fmt: skip
    elif MERGED:
        merged_rows(w, left, right, values, scaling, data, absmax, code, outer_code, outer_absmax, offset,
                    program - programs, OWN[0], OWN[1], OWN[2], OWN[3], OWN[4],
                    COMPONENTS_PADDED, GATING, BLOCKSIZE, NESTED, PAIRWISE, STEPS, WORDS)  # fmt: skip
    elif READ:
        dequantise_words(w, data, absmax, code, outer_code, outer_absmax, offset, program - programs, size,
                         BLOCKSIZE, NESTED, WORDS)  # fmt: skip


def thin_matrices(
    plan: ThinPlan,
    left: Tensor,
    right: Tensor,
    gates: Gates,
    dtype: torch.dtype,
    source: WeightSource | None = None,
    merged: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Returns L, (R, n), and Uᵀ, (R, m), in one vector, and the frozen weight W, (m, n), where asked for.

    Args:
        plan: The layer's plan.
        left: Packed left factors, float32.
        right: Packed right factors, float32; U holds them times w.
        gates: The weights w.
        dtype: Dtype of the results.
        source: A frozen 4-bit weight that :func:`can_dequantise`; None for L and Uᵀ alone.
        merged: Whether W + ΔW is asked for in the place of W, by a plan that has ``merged``.
    """
    thin = torch.empty(plan.hidden * (plan.plan.m + plan.plan.n), dtype=dtype, device=right.device)
    return thin, _fill(plan, dtype, left, right, gates, source, merged, thin)


def merged_weight(
    plan: ThinPlan, left: Tensor, right: Tensor, gates: Gates, dtype: torch.dtype, source: WeightSource
) -> Tensor:
    """Returns W + ΔW, (m, n).

    Args:
        plan: A layer's plan that has ``merged``.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
        dtype: Dtype of the result, bfloat16 (see :mod:`moka_pl.ops.triton.delta` on its rounding) or float32.
        source: The frozen 4-bit weight, which :func:`can_dequantise`.
    """
    weight = _fill(plan, dtype, left, right, gates, source, True)
    assert weight is not None
    return weight


def _fill(
    plan: ThinPlan,
    dtype: torch.dtype,
    left: Tensor,
    right: Tensor,
    gates: Gates,
    source: WeightSource | None,
    merged: bool,
    thin: Tensor | None = None,
) -> Tensor | None:
    """Returns W or W + ΔW of a source, and fills in L and Uᵀ where there is room for them."""
    m, n = plan.plan.m, plan.plan.n
    w = None if source is None else torch.empty(m, n, dtype=dtype, device=right.device)
    frozen_pointers, blocksize, nested = frozen_arguments(source, right)
    if w is not None:
        frozen_pointers = as_words(frozen_pointers)
    size = 0 if w is None else m * n // 8
    stripes, programs = (0, 0) if thin is None else (-(-n // COLUMNS), -(-n // COLUMNS) - (-m // COLUMNS))
    own = plan.merged if merged else ()
    for_weight = -(-own[2] // STEPS) * -(-n // (8 * WORDS)) if own else -(-size // (4 * WORDS))
    values, scaling, gating = gates
    launch(
        _fill_kernel, plan.compiled, ("fill", dtype, gating, blocksize, nested, merged, thin is None),
        (programs + for_weight, 1, 1), (right, left, values, *frozen_pointers[:2]),
        (thin if w is None else w, w if thin is None else thin, left, right, values, scaling, plan.rows,
         *frozen_pointers, stripes, programs, size, m, n, plan.hidden, plan.padded, len(plan.plan.shapes),
         plan.plan.padded, gating, w is not None, blocksize, nested, merged, own,
         rounds_pairwise(right.device), COLUMNS, STEPS, WORDS),
        num_warps=WORDS // 32, enable_fp_fusion=False,
    )  # fmt: skip
    return w
