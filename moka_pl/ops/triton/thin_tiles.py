"""Tiles of the thin kernels: loaded, stored and multiplied."""

import triton
import triton.language as tl


@triton.jit  # type: ignore[untyped-decorator]
def product(a, b, total, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """``total + a @ b``; Triton's interpreter would take bfloat16 factors for whole numbers."""
    kind: tl.constexpr = tl.float32 if UPCAST else a.dtype
    return tl.dot(a.to(kind), b.to(kind), total, input_precision="tf32x3")


@triton.jit  # type: ignore[untyped-decorator]
def load_tile(pointer, i, j, rows, columns, stride, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows i and columns j of a matrix, zeros beyond its end; FULL: there are none."""
    at = pointer + i[:, None].to(tl.int64) * stride + j[None, :]
    inside = (i < rows)[:, None] & (j < columns)[None, :]
    return tl.load(at) if FULL else tl.load(at, mask=inside, other=0.0)


@triton.jit  # type: ignore[untyped-decorator]
def store_tile(pointer, tile, i, j, rows, columns, stride, FULL: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stores what :func:`load_tile` loads."""
    at = pointer + i[:, None].to(tl.int64) * stride + j[None, :]
    if FULL:
        tl.store(at, tile)
    else:
        tl.store(at, tile, mask=(i < rows)[:, None] & (j < columns)[None, :])
