"""Thin updates of a batch whose rows have adapters of their own, added to the output in one launch.

For a token of a row with adapter k, ``y += U_k (L_k x)``. No L and no U is made: an entry of either is one of
a factor's, or zero, and the factors of a few adapters stay in the GPU's caches.

Reference: :func:`moka_pl.ops.rows.rows_update`.
"""

import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.layout import Shape
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.plan import Plan
from moka_pl.ops.triton.thin.plan import NARROWEST, Tile
from moka_pl.ops.triton.thin.products import load_tile, product, store_tile

#: The tiles of rows of few tokens, and of more, and how many are few: as timed for 4096 × 4096 and 11008 ×
#: 4096 on an H200.
_FEW, _MANY, _MOST_FEW = Tile(16, 256, 8, 3), Tile(32, 128, 4, 3), 64


@triton.jit(do_not_specialize=["tokens"])  # type: ignore[untyped-decorator]
def _rows_kernel(  # type: ignore[no-untyped-def]
    out, x, factors, rows, adapter, tokens, step, m, n,
    M_A: tl.constexpr, N_A: tl.constexpr, M_B: tl.constexpr, N_B: tl.constexpr, COUNT: tl.constexpr,
    R: tl.constexpr, PADDED: tl.constexpr, UPCAST: tl.constexpr,
    TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds ``U_k L_k x`` to some tokens of a row; reference: ``rows_update``."""
    row = tl.load(rows + tl.program_id(1))
    left = factors + tl.load(adapter + tl.program_id(1)) * step
    right = left + M_A * COUNT * N_A
    x += row * tokens * n
    out += row * tokens * m
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    # Hidden number r is (a, c, q): row a of the left factor of component c, column q of its right one.
    r = tl.arange(0, PADDED)
    real, a = (r < R)[:, None], (r // (COUNT * N_B))[:, None]
    c, q = (r // N_B % COUNT)[:, None], (r % N_B)[:, None]
    total = tl.zeros((TOKENS, PADDED), tl.float32)
    for first in range(0, n, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        tile = load_tile(x, t, j, tokens, n, n, False)
        p = (j // N_B)[None, :]
        met = real & (p < N_A) & ((j % N_B)[None, :] == q)
        down = tl.load(left + (a * COUNT + c) * N_A + p, mask=met, other=0.0)
        total = product(tile, tl.trans(down.to(x.dtype.element_ty)), total, UPCAST)
    numbers = total.to(x.dtype.element_ty)  # (TOKENS, PADDED)
    for first in range(0, m, COLUMNS):
        j = first + tl.arange(0, COLUMNS)
        met = real & ((j // M_B)[None, :] == a)
        up = tl.load(right + (c * N_B + q) * M_B + (j % M_B)[None, :], mask=met, other=0.0)
        y = load_tile(out, t, j, tokens, m, m, False).to(tl.float32)
        y = product(numbers, up.to(x.dtype.element_ty), y, UPCAST)
        store_tile(out, y.to(out.dtype.element_ty), t, j, tokens, m, m, False)


def add_thin_rows_(
    plan: Plan, out: Tensor, x: Tensor, factors: Tensor, shape: Shape, rows: Tensor, adapter: Tensor
) -> Tensor:
    """Adds the updates of some rows to ``out`` and returns that; no gradients.

    Sums run in float32; hidden numbers and the result are rounded to the dtype of x.

    Args:
        plan: The layer's plan.
        out: The frozen layer's output, shape (N, T, m), contiguous; changed in place.
        x: Its input, shape (N, T, n), contiguous, of the same dtype.
        factors: Those of K adapters, whose components are of one shape and have their left factors first, as
            :func:`moka_pl.ops.rows.stack_factors` makes them, shape (K, entries), float32, contiguous.
        shape: The components' shape.
        rows: The rows, shape (I,), int64.
        adapter: Which adapter each of them has, shape (I,), int64.
    """
    _, tokens, n = x.shape
    count = len(plan.shapes)
    hidden = shape.m_a * count * shape.n_b
    padded = max(NARROWEST, triton.next_power_of_2(hidden))
    tile = _FEW if tokens <= _MOST_FEW else _MANY
    launch(
        _rows_kernel, plan.compiled, ("thin rows", x.dtype, tile), (-(-tokens // tile.tokens), len(rows), 1),
        (out, x, factors, rows, adapter),
        (out, x, factors, rows, adapter, tokens, factors.shape[1], plan.m, n, *shape[:4], count, hidden,
         padded, not x.is_cuda, tile.tokens, tile.columns),
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
