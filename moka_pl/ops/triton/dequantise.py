"""A frozen 4-bit weight as a matrix, by 32-bit words of eight numbers.

Reference: :func:`moka_pl.backbone.quantization.dense_weight`, bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.base_weight import WeightSource, frozen_arguments
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.plan import WORDS


@triton.jit  # type: ignore[untyped-decorator]
def scales(  # type: ignore[no-untyped-def]
    absmax, outer_code, outer_absmax, offset, i, inside, BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr
):
    """The scales of words i."""
    block = i // (BLOCKSIZE // 8)
    if NESTED:
        number = tl.load(absmax + block, mask=inside, other=0).to(tl.int32)
        outer = tl.load(outer_absmax + block // 256, mask=inside, other=0.0)
        largest = tl.load(outer_code + number) * outer + tl.load(offset)
    else:
        largest = tl.load(absmax + block, mask=inside, other=0.0)
    return largest


@triton.jit
def entries(word, largest, code):  # type: ignore[no-untyped-def]
    """The entries of words, (WORDS, 8): of each eight, the first in the upper half of the lowest byte."""
    number = (word[:, None] >> (4 * (tl.arange(0, 8)[None, :] ^ 1))) & 15
    return tl.load(code + number) * largest[:, None]


@triton.jit
def _put_words(out, word, largest, code, i, inside):  # type: ignore[no-untyped-def]
    """Stores the entries of words i.

    A thread has one word, so that its entries lie side by side in one wide store.
    """
    k = tl.arange(0, 8)[None, :]
    value = entries(word, largest, code)
    tl.store(out + i[:, None] * 8 + k, value.to(out.dtype.element_ty), mask=inside[:, None])


@triton.jit  # type: ignore[untyped-decorator]
def dequantise_words(  # type: ignore[no-untyped-def]
    out, words, absmax, code, outer_code, outer_absmax, offset, program, size,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Four times WORDS words of W: all are under way before the first is stored."""
    i_0 = program * (4 * WORDS) + tl.arange(0, WORDS)
    i_1, i_2, i_3 = i_0 + WORDS, i_0 + 2 * WORDS, i_0 + 3 * WORDS
    word_0 = tl.load(words + i_0, mask=i_0 < size, other=0)
    word_1 = tl.load(words + i_1, mask=i_1 < size, other=0)
    word_2 = tl.load(words + i_2, mask=i_2 < size, other=0)
    word_3 = tl.load(words + i_3, mask=i_3 < size, other=0)
    scale_0 = scales(absmax, outer_code, outer_absmax, offset, i_0, i_0 < size, BLOCKSIZE, NESTED)
    scale_1 = scales(absmax, outer_code, outer_absmax, offset, i_1, i_1 < size, BLOCKSIZE, NESTED)
    scale_2 = scales(absmax, outer_code, outer_absmax, offset, i_2, i_2 < size, BLOCKSIZE, NESTED)
    scale_3 = scales(absmax, outer_code, outer_absmax, offset, i_3, i_3 < size, BLOCKSIZE, NESTED)
    _put_words(out, word_0, scale_0, code, i_0, i_0 < size)
    _put_words(out, word_1, scale_1, code, i_1, i_1 < size)
    _put_words(out, word_2, scale_2, code, i_2, i_2 < size)
    _put_words(out, word_3, scale_3, code, i_3, i_3 < size)


@triton.jit  # type: ignore[untyped-decorator]
def _dequantise_kernel(  # type: ignore[no-untyped-def]
    out, data, absmax, code, outer_code, outer_absmax, offset, size,
    BLOCKSIZE: tl.constexpr, NESTED: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """W, by four times WORDS words a program."""
    dequantise_words(out, data, absmax, code, outer_code, outer_absmax, offset, tl.program_id(0), size,
                     BLOCKSIZE, NESTED, WORDS)  # fmt: skip


#: Kernels compiled for weights of one number of words.
_compiled: dict[int, dict[Any, Any]] = {}


def can_dequantise(source: WeightSource | None, entries: int) -> bool:
    """Whether :func:`dequantise` reads a weight of so many entries: of 4 bits, in whole words."""
    if source is None or source.code is None or source.data.element_size() != 1:
        return False
    return entries % 8 == 0 and source.data.numel() * 2 == entries and source.data.data_ptr() % 16 == 0


def as_words(frozen_pointers: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors of :func:`moka_pl.ops.triton.base_weight.frozen_arguments`, the numbers as 32-bit words."""
    return (frozen_pointers[0].view(-1).view(torch.int32), *frozen_pointers[1:])


def dequantise(source: WeightSource, m: int, n: int, dtype: torch.dtype) -> Tensor:
    """Returns the frozen weight W, (m, n).

    Args:
        source: A 4-bit weight that :func:`can_dequantise`.
        m: Its rows.
        n: Its columns.
        dtype: Dtype of the result.
    """
    out = torch.empty(m, n, dtype=dtype, device=source.data.device)
    pointers, blocksize, nested = frozen_arguments(source, out)
    size = m * n // 8
    launch(
        _dequantise_kernel, _compiled.setdefault(size, {}), (dtype, blocksize, nested, out.device),
        (-(-size // (4 * WORDS)), 1, 1), pointers[:2],
        (out, *as_words(pointers), size, blocksize, nested, WORDS),
        num_warps=WORDS // 32, enable_fp_fusion=False,
    )  # fmt: skip
    return out
