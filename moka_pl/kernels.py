"""Triton kernels: ΔW in one launch, and its gradient projected onto all factors in two.

Both work on the factors of one layer packed into one flat vector, and take every component's sizes from a
small table, so that one launch serves any mixture of shapes, whether they divide the layer or not.

For D = ∂L/∂ΔW and component c with pair index t = (a, p) and entry index e = (b, q):
    dA[t] = w Σ_e D[a m_b + b, p n_b + q] B[e],   dB[e] = w Σ_t D[…] A[t],   dw = Σ_e (dB[e] / w) B[e]
Each program holds one stretch of entries and walks over a share of the pairs, so that D is read once per
component, and sums in a fixed order: results do not change from run to run.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from moka_pl.shape import Shape

#: Entries of B that one program of the projection holds, and pairs that it takes at once.
_ENTRIES = 1024
_PAIRS = 4
#: Sides of the squares that ΔW is built from, and squares that one program builds side by side.
_SIDES = (16, 8)
_BLOCKS = 8
#: Shares that the pairs of a component are split into.
_SPLITS = 32


@triton.jit  # type: ignore[untyped-decorator]
def _delta_kernel(  # type: ignore[no-untyped-def]
    flat, weights, rows, columns, out, m, n,
    R: tl.constexpr, IDENTITY: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0) * BM + tl.arange(0, BM)
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    in_rows, in_columns = i < m, j < n
    total = tl.zeros((BM, BN), tl.float32)
    for c in tl.static_range(R):
        # Where row i and column j lie in the packed factors; -1 beyond the component's end.
        row_left = tl.load(rows + (2 * c) * m + i, mask=in_rows, other=-1)
        row_right = tl.load(rows + (2 * c + 1) * m + i, mask=in_rows, other=0)
        column_left = tl.load(columns + (2 * c) * n + j, mask=in_columns, other=-1)
        column_right = tl.load(columns + (2 * c + 1) * n + j, mask=in_columns, other=0)
        inside = (row_left >= 0)[:, None] & (column_left >= 0)[None, :]
        if IDENTITY:
            inside = inside & (row_left[:, None] == column_left[None, :])
            left = 1.0
        else:
            left = tl.load(flat + (row_left[:, None] + column_left[None, :]), mask=inside, other=0.0)
        right = tl.load(flat + (row_right[:, None] + column_right[None, :]), mask=inside, other=0.0)
        total += tl.load(weights + c) * left * right
    inside = in_rows[:, None] & in_columns[None, :]
    tl.store(out + i[:, None].to(tl.int64) * n + j[None, :], total.to(out.dtype.element_ty), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _delta_blocks_kernel(  # type: ignore[no-untyped-def]
    flat, weights, table, out, n,
    R: tl.constexpr, SIDE: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    # SIDE divides every m_b and n_b: a SIDE x SIDE square of the result meets one entry of each left factor,
    # and the entries of the right factor that it needs lie side by side.
    top = tl.program_id(0) * SIDE
    corner = (tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)) * SIDE  # first column of each square
    down, across = tl.arange(0, SIDE), tl.arange(0, SIDE)
    total = tl.zeros((SIDE, BLOCKS, SIDE), tl.float32)
    for c in tl.static_range(R):
        entry = table + c * 7
        n_a, m_b, n_b = tl.load(entry + 1), tl.load(entry + 2), tl.load(entry + 3)
        left_at, right_at = tl.load(entry + 5), tl.load(entry + 6)
        left = tl.load(weights + c) * tl.load(
            flat + left_at + (top // m_b) * n_a + corner // n_b
        )  # (BLOCKS,)
        begin = tl.multiple_of(right_at + (top % m_b) * n_b + corner % n_b, 4)
        line = tl.multiple_of(down * n_b, 4)
        place = begin[None, :, None] + line[:, None, None] + across[None, None, :]
        total += left[None, :, None] * tl.load(flat + place)
    rows = (top + down).to(tl.int64) * n
    place = rows[:, None, None] + tl.multiple_of(corner, SIDE)[None, :, None] + across[None, None, :]
    tl.store(out + place, total.to(out.dtype.element_ty))


@triton.jit  # type: ignore[untyped-decorator]
def _project_kernel(  # type: ignore[no-untyped-def]
    grad, flat, table, tiles, part_left, part_right, m, n, left_size, right_size,
    EXACT: tl.constexpr, SPLITS: tl.constexpr, ENTRIES: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    tile = tiles + tl.program_id(0) * 3
    c, start, number = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    split = tl.program_id(1)
    entry = table + c * 7
    m_a, n_a = tl.load(entry), tl.load(entry + 1)
    m_b, n_b = tl.load(entry + 2), tl.load(entry + 3)
    identity = tl.load(entry + 4)
    left_at, right_at = tl.load(entry + 5), tl.load(entry + 6)

    e = start + tl.arange(0, ENTRIES)
    b, q = e // n_b, e % n_b
    held = e < m_b * n_b
    right = tl.load(flat + right_at + e, mask=held, other=0.0)
    total = tl.zeros((ENTRIES,), tl.float32)
    # With an identity on the left only the diagonal pairs (a, a) count, each with weight 1.
    pairs = tl.where(identity != 0, tl.minimum(m_a, n_a), m_a * n_a)
    share = tl.cdiv(pairs, SPLITS)
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
            d = tl.load(grad + corner[:, None] + within[None, :]).to(tl.float32)
        else:
            row = a[:, None] * m_b + b[None, :]
            column = p[:, None] * n_b + q[None, :]
            inside = real[:, None] & held[None, :] & (row < m) & (column < n)
            d = tl.load(grad + row.to(tl.int64) * n + column, mask=inside, other=0.0).to(tl.float32)
        keep = real & (t * 0 + identity == 0)
        left = tl.load(flat + left_at + t, mask=keep, other=1.0)
        total += tl.sum(d * left[:, None], 0)
        tl.store(
            part_left + number.to(tl.int64) * left_size + left_at + t,
            tl.sum(d * right[None, :], 1),
            mask=keep,
        )
    tl.store(part_right + split.to(tl.int64) * right_size + right_at + e, total, mask=held)


@triton.jit  # type: ignore[untyped-decorator]
def _finish_kernel(  # type: ignore[no-untyped-def]
    flat, weights, table, part_left, part_right, grad_flat, grad_weights, left_size, right_size,
    SPLITS: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0)
    entry = table + c * 7
    m_a, n_a = tl.load(entry), tl.load(entry + 1)
    m_b, n_b = tl.load(entry + 2), tl.load(entry + 3)
    identity = tl.load(entry + 4)
    left_at, right_at = tl.load(entry + 5), tl.load(entry + 6)
    w = tl.load(weights + c)
    product = tl.zeros((ENTRIES,), tl.float32)
    for start in range(0, m_b * n_b, ENTRIES):
        e = start + tl.arange(0, ENTRIES)
        held = e < m_b * n_b
        total = tl.zeros((ENTRIES,), tl.float32)
        for split in range(SPLITS):
            total += tl.load(part_right + split * right_size + right_at + e, mask=held, other=0.0)
        tl.store(grad_flat + right_at + e, total * w, mask=held)
        product += total * tl.load(flat + right_at + e, mask=held, other=0.0)
    tl.store(grad_weights + c, tl.sum(product, 0))
    if identity == 0:
        numbers = tl.cdiv(m_b * n_b, ENTRIES)
        for start in range(0, m_a * n_a, ENTRIES):
            t = start + tl.arange(0, ENTRIES)
            held = t < m_a * n_a
            total = tl.zeros((ENTRIES,), tl.float32)
            for number in range(numbers):
                total += tl.load(part_left + number * left_size + left_at + t, mask=held, other=0.0)
            tl.store(grad_flat + left_at + t, total * w, mask=held)


class _Tables(NamedTuple):
    """What the kernels know of a layer's components; made once for every layer size.

    Attributes:
        shapes: m_a, n_a, m_b, n_b, identity, and where A and B begin in the packed factors, (r, 7).
        tiles: Component, first entry and number of each tile of the projection.
        most: Most tiles of a component.
        rows: For every component and row of ΔW its place in A and in B, (2 r, m).
        columns: The same for columns, (2 r, n).
        exact: Whether all components divide the layer, the tiles and the wide loads.
        side: Largest side of squares that meet one entry of each left factor and fill the layer; 0 for none.
    """

    shapes: Tensor
    tiles: Tensor
    most: int
    rows: Tensor
    columns: Tensor
    exact: bool
    side: int


@lru_cache(maxsize=256)
def _tables(shapes: tuple[Shape, ...], m: int, n: int, device: torch.device) -> _Tables:
    table, tiles, rows, columns, at = [], [], [], [], 0
    i, j = torch.arange(m), torch.arange(n)
    for c, shape in enumerate(shapes):
        left_at = at
        at += 0 if shape.identity else shape.m_a * shape.n_a
        table.append([*shape[:4], int(shape.identity), left_at, at])
        entries = shape.m_b * shape.n_b
        tiles += [[c, start, number] for number, start in enumerate(range(0, entries, _ENTRIES))]
        a, p = i // shape.m_b, j // shape.n_b
        # With an identity only the numbers of block row and column are compared.
        row_left = a if shape.identity else left_at + a * shape.n_a
        rows += [row_left.where(a < shape.m_a, -1), at + i % shape.m_b * shape.n_b]
        columns += [p.where(p < shape.n_a, -1), j % shape.n_b]
        at += entries
    exact = all(
        (s.rows, s.cols) == (m, n)
        and not s.identity
        and s.m_b * s.n_b % _ENTRIES == 0
        and s.m_a * s.n_a % (_SPLITS * _PAIRS) == 0
        and s.n_b % 8 == 0
        for s in shapes
    )
    whole = all((s.rows, s.cols) == (m, n) and not s.identity for s in shapes)
    side = next(
        (
            d
            for d in _SIDES
            if whole and n % (d * _BLOCKS) == 0 and all(s.m_b % d == s.n_b % d == 0 for s in shapes)
        ),
        0,
    )

    def put(values: Tensor) -> Tensor:
        return values.to(torch.int32).to(device)

    return _Tables(
        put(torch.tensor(table)),
        put(torch.tensor(tiles)),
        max(number for _, _, number in tiles) + 1,
        put(torch.stack(rows)),
        put(torch.stack(columns)),
        exact and m * n < 2**31,
        side,
    )


def pack(factors: Sequence[tuple[Tensor | None, Tensor]]) -> Tensor:
    """Packs A_1, B_1, A_2, B_2, … into one flat vector (identities take no place)."""
    return torch.cat([factor.reshape(-1) for pair in factors for factor in pair if factor is not None])


def fused_delta(
    flat: Tensor, weights: Tensor, shapes: tuple[Shape, ...], m: int, n: int, dtype: torch.dtype
) -> Tensor:
    """Builds ``ΔW = Σ_i w_i (A_i ⊗ B_i)``, shape (m, n), in one launch.

    Args:
        flat: All factors as :func:`pack` lays them out, float32.
        weights: w, shape (r,), float32.
        shapes: r shapes.
        m: Rows of the layer.
        n: Columns of the layer.
        dtype: Result dtype; the sum runs in float32.
    """
    tables = _tables(shapes, m, n, flat.device)
    out = torch.empty(m, n, dtype=dtype, device=flat.device)
    if tables.side:
        _delta_blocks_kernel[(m // tables.side, n // (tables.side * _BLOCKS))](
            flat, weights, tables.shapes, out, n,
            R=len(shapes), SIDE=tables.side, BLOCKS=_BLOCKS, num_warps=4,
        )  # fmt: skip
        return out
    block_m, block_n = 16, 64
    _delta_kernel[(triton.cdiv(m, block_m), triton.cdiv(n, block_n))](
        flat, weights, tables.rows, tables.columns, out, m, n,
        R=len(shapes), IDENTITY=shapes[0].identity, BM=block_m, BN=block_n, num_warps=4,
    )  # fmt: skip
    return out


def fused_projection(
    grad: Tensor, flat: Tensor, weights: Tensor, shapes: tuple[Shape, ...]
) -> tuple[Tensor, Tensor]:
    """Pulls D = ∂L/∂ΔW back to the packed factors and the weights, in two launches.

    Args:
        grad: D, shape (m, n), contiguous.
        flat: Packed factors, float32.
        weights: w, shape (r,), float32.
        shapes: r shapes.

    Returns:
        Gradients of ``flat`` and ``weights``.
    """
    m, n = grad.shape
    tables = _tables(shapes, m, n, flat.device)
    table, tiles = tables.shapes, tables.tiles
    size = flat.numel()
    # Every place that is read later is written: each tile writes its pairs, each split its entries.
    part_left = torch.empty(tables.most, size, dtype=torch.float32, device=flat.device)
    part_right = torch.empty(_SPLITS, size, dtype=torch.float32, device=flat.device)
    grad_flat, grad_weights = torch.empty_like(flat), torch.empty_like(weights)
    _project_kernel[(len(tiles), _SPLITS)](
        grad, flat, table, tiles, part_left, part_right, m, n, size, size,
        EXACT=tables.exact, SPLITS=_SPLITS, ENTRIES=_ENTRIES, PAIRS=_PAIRS, num_warps=4,
    )  # fmt: skip
    _finish_kernel[(len(shapes),)](
        flat, weights, table, part_left, part_right, grad_flat, grad_weights, size, size,
        SPLITS=_SPLITS, ENTRIES=_ENTRIES, num_warps=8,
    )  # fmt: skip
    return grad_flat, grad_weights


class FusedSum(torch.autograd.Function):
    """``Σ_i w_i (A_i ⊗ B_i) x`` through :func:`fused_delta`; saves x, w and the packed factors."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, flat: Tensor, shapes: tuple[Shape, ...], m: int
    ) -> Tensor:
        """Maps x of shape (T, n) to (T, m)."""
        ctx.save_for_backward(x, weights, flat)
        ctx.shapes = shapes
        return x @ fused_delta(flat, weights, shapes, m, x.shape[1], x.dtype).mT  # (T, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and the packed factors."""
        x, weights, flat = ctx.saved_tensors
        m, n = grad.shape[1], x.shape[1]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ fused_delta(flat, weights, ctx.shapes, m, n, x.dtype)  # (T, n)
        grad_flat, grad_weights = fused_projection(grad.mT @ x, flat, weights, ctx.shapes)
        return grad_x, grad_weights, grad_flat, None, None
