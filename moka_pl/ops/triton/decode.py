"""The update's product for a few tokens, as in generating, added to the output in two launches.

For one block row a of a component, ``y[a m_b + b] = w Σ_q B[b, q] h[q]`` with ``h[q] = Σ_p A[a, p] X[p, q]``,
X being x as an n_a × n_b matrix: hardly any work, so that launches are all that counts.

Reference: :func:`moka_pl.ops.structured.add_update_`, with tokens in columns.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.gates import Gates, softmax_parts, weight
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.plan import DECODE_ROWS, Plan

#: Rows and columns of X that a program takes at once.
_P, _Q = 64, 64
#: Outputs that one program of the second launch adds up.
_OUT = 256


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]
    parts, x, left, right, values, scaling, work, adapter, left_step, right_step, m, n,
    R: tl.constexpr, PADDED: tl.constexpr, GATING: tl.constexpr, OWN: tl.constexpr,
    ROWS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr,
):  # fmt: skip
    """Rows of every ``w_i (A_i ⊗ B_i) x``, parts of (T, r, m); reference: ``add_update_`` (see above).

    If OWN, each token's factors and weights are those of its own adapter.
    """
    item = work + tl.program_id(0) * 9
    component, a, first = tl.load(item), tl.load(item + 1), tl.load(item + 2)
    n_a, m_b, n_b = tl.load(item + 3), tl.load(item + 4), tl.load(item + 5)
    identity, left_at, right_at = tl.load(item + 6), tl.load(item + 7), tl.load(item + 8)
    token = tl.program_id(1)
    if OWN:
        which = tl.load(adapter + token)
        left += which * left_step
        right += which * right_step
        values += which * R
    highest, sum_ = softmax_parts(values, R, PADDED, GATING)
    b = first + tl.arange(0, ROWS)
    total = tl.zeros((ROWS,), tl.float32)
    begin = tl.where(identity != 0, a, 0)
    stop = tl.where(identity != 0, a + 1, n_a)
    for q0 in range(0, n_b, Q):
        q = q0 + tl.arange(0, Q)
        hidden = tl.zeros((Q,), tl.float32)
        for p0 in range(begin, stop, P):
            p = p0 + tl.arange(0, P)
            real = p < stop
            scale = tl.load(left + left_at + a * n_a + p, mask=real & (p * 0 + identity == 0), other=1.0)
            column = p[:, None] * n_b + q[None, :]
            inside = real[:, None] & (q < n_b)[None, :] & (column < n)
            grid = tl.load(x + token * n + column, mask=inside, other=0.0).to(tl.float32)  # (P, Q)
            hidden += tl.sum(scale[:, None] * grid, 0)
        inside = (b < m_b)[:, None] & (q < n_b)[None, :]
        factor = tl.load(right + right_at + b[:, None] * n_b + q[None, :], mask=inside, other=0.0)
        total += tl.sum(factor * hidden[None, :], 1)
    total *= weight(values, component, scaling, highest, sum_, GATING)
    row = a * m_b + b
    tl.store(parts + (token * R + component) * m + row, total, mask=(b < m_b) & (row < m))


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(  # type: ignore[no-untyped-def]
    out, parts, ends, m, R: tl.constexpr, OUT: tl.constexpr
):
    """Adds the components' rows of ``parts``, (T, r, m), to ``out``, (T, m)."""
    token = tl.program_id(1)
    i = tl.program_id(0) * OUT + tl.arange(0, OUT)
    inside = i < m
    total = tl.load(out + token * m + i, mask=inside, other=0.0).to(tl.float32)
    for c in tl.static_range(R):
        # Rows beyond a component's end were not written.
        written = inside & (i < tl.load(ends + c))
        total += tl.load(parts + (token * R + c) * m + i, mask=written, other=0.0)
    tl.store(out + token * m + i, total.to(out.dtype.element_ty), mask=inside)


def add_decode_update_(
    plan: Plan,
    out: Tensor,
    x: Tensor,
    left: Tensor,
    right: Tensor,
    gates: Gates,
    adapter: Tensor | None = None,
) -> Tensor:
    """Adds ``Σ_i w_i (A_i ⊗ B_i) x`` to ``out`` and returns that; no gradients.

    Sums run in float32 and are rounded once.

    Args:
        plan: The layer's plan.
        out: The frozen layer's output, shape (T, m), contiguous; changed in place.
        x: Its input, shape (T, n), contiguous.
        left: Packed left factors, float32; of K adapters (K, entries), contiguous, if ``adapter`` is given.
        right: Packed right factors, likewise.
        gates: The weights w; their values are (K, r) if ``adapter`` is given.
        adapter: Which of K adapters each token has, (T,), int64; None where there is one.
    """
    values, scaling, gating = gates
    tokens, r, own = len(x), len(plan.shapes), adapter is not None
    parts = torch.empty(tokens, r, plan.m, dtype=torch.float32, device=x.device)  # (T, r, m)
    steps = (adapter, left.shape[-1], right.shape[-1]) if own else (plan.ends, 0, 0)
    launch(
        _rows_kernel, plan.compiled, ("rows", x.dtype, gating, own), (len(plan.decode), tokens, 1),
        (x, left, right, values) if adapter is None else (x, left, right, values, adapter),
        (parts, x, left, right, values, scaling, plan.decode, *steps, plan.m, plan.n,
         r, plan.padded, gating, own, DECODE_ROWS, _P, _Q),
        num_warps=4,
    )  # fmt: skip
    launch(
        _add_kernel, plan.compiled, ("add", out.dtype), (-(-plan.m // _OUT), tokens, 1), (out,),
        (out, parts, plan.ends, plan.m, r, _OUT),
        num_warps=2,
    )  # fmt: skip
    return out
