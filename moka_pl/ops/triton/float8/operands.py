"""Operands of products in 8-bit floats (E4M3): activations by rows, a frozen 4-bit weight by rows or columns.

Row i of a matrix is stored as the numbers ``x_ij / s_i`` with ``s_i = max_j |x_ij| / 448``, 448 being the
largest number of the format. The product then multiplies with the scales of both sides::

    x Wᵀ ≈ s_x (X̂ Ŵᵀ) s_Wᵀ              Ŵ by rows, (m, n), a scale per output feature
    G W  ≈ s_G (Ĝ Ŵ') s_W'               Ŵ' by columns, a scale per input feature

Both operands must lie so that what is summed over is contiguous: Ŵ' is written transposed, (n, m).

References: :func:`reference_rows` and :func:`reference_weight`.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.base_weight import WeightSource, frozen_arguments
from moka_pl.ops.triton.dequantise import as_words, scales
from moka_pl.ops.triton.launch import launch

FLOAT8 = torch.float8_e4m3fn

#: Largest number of the format, and the least maximum of a row: zeros are divided by something, too.
LARGEST, _LEAST = 448.0, 1e-30

#: Entries of a row for each thread; words of W for each program; rows, words and warps of a transposed tile.
_ENTRIES, _WORDS, _TILE = 64, 256, (128, 8, 2)


class Scaled(NamedTuple):
    """A matrix in 8-bit floats.

    Attributes:
        numbers: (rows, columns), contiguous.
        scales: The scale of each row, (rows, 1), float32.
    """

    numbers: Tensor
    scales: Tensor


class WeightScales(NamedTuple):
    """The scales of a frozen weight W, (m, n), float32, and their inverses, which its kernels multiply by.

    Attributes:
        rows: max_j |W_ij| / 448, (m, 1).
        columns: max_i |W_ij| / 448, (n, 1).
        by_rows: 1 / rows.
        by_columns: 1 / columns.
    """

    rows: Tensor
    columns: Tensor
    by_rows: Tensor
    by_columns: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "WeightScales":
        """Finds the scales of W, (m, n), dequantised."""
        largest = [
            torch.linalg.vector_norm(weight, torch.inf, dim, dtype=torch.float32).clamp_(_LEAST)[:, None]
            for dim in (1, 0)
        ]  # (m, 1), (n, 1)
        return cls(*(entry / LARGEST for entry in largest), *(LARGEST / entry for entry in largest))


def reference_rows(x: Tensor) -> Scaled:
    """What :func:`scale_rows` computes, by PyTorch."""
    largest = x.float().abs().amax(1, keepdim=True).clamp(_LEAST)  # (T, 1)
    return Scaled((x.float() * (LARGEST / largest)).to(FLOAT8), largest * (1 / LARGEST))


def reference_weight(weight: Tensor, inverse: Tensor) -> Tensor:
    """What :func:`scale_weight` computes but for the rounding of its factors, by PyTorch.

    Args:
        weight: W or Wᵀ, float32.
        inverse: The inverse scales of its rows, (rows, 1).
    """
    return (weight * inverse).to(FLOAT8)


@triton.jit  # type: ignore[untyped-decorator]
def _rows_kernel(out, row_scales, x, n, LEAST: tl.constexpr, LARGEST: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A row; one that holds inf or NaN becomes NaN."""
    row = tl.program_id(0).to(tl.int64)
    j = tl.arange(0, COLUMNS)
    value = tl.load(x + row * n + j, mask=j < n, other=0.0).to(tl.float32)
    largest = tl.maximum(tl.max(tl.abs(value), 0), LEAST)
    value *= tl.div_rn(LARGEST, largest)
    tl.store(out + row * n + j, value.to(out.dtype.element_ty), mask=j < n)
    tl.store(row_scales + row, largest * (1 / LARGEST))


@triton.jit  # type: ignore[untyped-decorator]
def _weight_kernel(  # type: ignore[no-untyped-def]
    out, words, absmax, code, outer_code, outer_absmax, offset, inverse, size, row,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """WORDS words of W by rows of ``row`` words."""
    i = tl.program_id(0) * WORDS + tl.arange(0, WORDS)
    inside = i < size
    word = tl.load(words + i, mask=inside, other=0)
    factor = scales(absmax, outer_code, outer_absmax, offset, i, inside, BLOCKSIZE, NESTED)
    factor *= tl.load(inverse + i // row, mask=inside, other=0.0)
    k = tl.arange(0, 8)[None, :]
    number = (word[:, None] >> (4 * (k ^ 1))) & 15
    value = tl.load(code + number) * factor[:, None]
    tl.store(out + i[:, None] * 8 + k, value.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def _transposed_kernel(  # type: ignore[no-untyped-def]
    out, words, absmax, code, outer_code, outer_absmax, offset, inverse, m, row,
    DTYPE: tl.constexpr, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr,
    FOURS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """A tile of W by columns, transposed: numbers of four rows of W make an integer of a row of Wᵀ."""
    four = tl.program_id(0) * FOURS + tl.arange(0, FOURS)
    w = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = (four < m // 4)[:, None] & (w < row)[None, :]
    k = tl.arange(0, 8)
    column = w[:, None] * 8 + k[None, :]
    scale = tl.load(inverse + column, mask=(w < row)[:, None], other=0.0)[None, :, :]
    packed = tl.zeros((FOURS, WORDS, 8), tl.uint32)
    for r in tl.static_range(4):
        i = (four[:, None] * 4 + r) * row + w[None, :]
        word = tl.load(words + i, mask=inside, other=0)
        largest = scales(absmax, outer_code, outer_absmax, offset, i, inside, BLOCKSIZE, NESTED)
        number = (word[:, :, None] >> (4 * (k ^ 1))[None, None, :]) & 15
        value = (tl.load(code + number) * (largest[:, :, None] * scale)).to(DTYPE)
        packed |= value.to(tl.uint8, bitcast=True).to(tl.uint32) << (8 * r)
    j = tl.program_id(1) * (8 * WORDS) + tl.arange(0, 8 * WORDS)
    at = j[None, :] * (m // 4) + four[:, None]
    packed = tl.reshape(packed, (FOURS, 8 * WORDS))
    tl.store(out + at, packed, mask=(four < m // 4)[:, None] & (j < 8 * row)[None, :])


#: Kernels compiled for rows or weights of one size.
_compiled: dict[Any, dict[Any, Any]] = {}


def scale_rows(x: Tensor) -> Scaled:
    """Returns x, (T, n), in 8-bit floats with a scale per row, by one launch that reads x once.

    Args:
        x: A matrix, contiguous.
    """
    rows, n = x.shape
    out = torch.empty(rows, n, dtype=FLOAT8, device=x.device)
    row_scales = torch.empty(rows, 1, dtype=torch.float32, device=x.device)
    columns = 1 << (n - 1).bit_length()
    launch(
        _rows_kernel, _compiled.setdefault(n, {}), ("rows", x.dtype, x.device), (rows, 1, 1), (x,),
        (out, row_scales, x, n, _LEAST, LARGEST, columns),
        num_warps=min(max(columns // (32 * _ENTRIES), 1), 16),
    )  # fmt: skip
    return Scaled(out, row_scales)


def scale_weight(source: WeightSource, weight_scales: WeightScales, transposed: bool) -> Scaled:
    """Returns a frozen weight W, (m, n), in 8-bit floats: by rows, or by columns and transposed, (n, m).

    Args:
        source: A 4-bit weight that :func:`moka_pl.ops.triton.can_dequantise`.
        weight_scales: Its scales; 8 divides n, and transposed 4 divides m.
        transposed: Whether to return Wᵀ.
    """
    own, device = weight_scales, source.data.device
    m, n = len(own.rows), len(own.columns)
    pointers, blocksize, nested = frozen_arguments(source, own.rows)
    compiled = _compiled.setdefault((m, n), {})
    if not transposed:
        out = torch.empty(m, n, dtype=FLOAT8, device=device)
        size = m * n // 8
        launch(
            _weight_kernel, compiled, ("weight", blocksize, nested, device), (-(-size // _WORDS), 1, 1),
            pointers[:2],
            (out, *as_words(pointers), own.by_rows, size, n // 8, blocksize, nested, _WORDS),
            num_warps=_WORDS // 32,
        )  # fmt: skip
        return Scaled(out, own.rows)
    out = torch.empty(n, m, dtype=FLOAT8, device=device)
    tile_rows, words, warps = _TILE
    fours = tile_rows // 4
    launch(
        _transposed_kernel, compiled, ("transposed", blocksize, nested, device),
        (-(-m // (4 * fours)), -(-n // (8 * words)), 1), pointers[:2],
        (out.view(torch.uint32), *as_words(pointers), own.by_columns, m, n // 8, tl.float8e4nv, blocksize,
         nested, fours, words),
        num_warps=warps,
    )  # fmt: skip
    return Scaled(out, own.columns)
