r"""The loss of tokens from their logits, and its gradient written over these, in one launch.

For logits z of one token, a wanted token y and a factor g,

.. math::
    \ell = \log \sum_j e^{z_j} - z_y, \qquad g \, \frac{\partial \ell}{\partial z} = g \, (p - e_y), \quad
    p = \mathrm{softmax}(z)

Logits are read twice and written once, in their own dtype; sums run in float32. In PyTorch the same takes
eight passes over numbers of four bytes.

Reference: ``_nll_and_errors`` of :mod:`moka_pl.lm.head_loss`.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.triton.launch import launch

#: Logits that a program takes at once, at most.
_BLOCK = 8192

_compiled: dict[Any, Any] = {}


@triton.jit  # type: ignore[untyped-decorator]
def _nll_kernel(  # type: ignore[no-untyped-def]
    nll, errors, logits, wanted, factor, vocabulary,
    IGNORED: tl.constexpr, WRITE: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One token's loss and, if WRITE, the gradient of its logits, which may lie where these do."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * vocabulary
    token = tl.load(wanted + row)
    known = token != IGNORED
    # Loaded before the first sum, for which threads wait for each other: the gradient takes its place.
    chosen = tl.load(logits + tl.where(known, token, 0)).to(tl.float32)
    end = tl.where(known, vocabulary, 0)
    highest, total = -float("inf"), 0.0
    for first in range(0, end, BLOCK):
        j = first + tl.arange(0, BLOCK)
        z = tl.load(logits + j, mask=j < vocabulary, other=-float("inf")).to(tl.float32)
        above = tl.maximum(highest, tl.max(z, 0))
        shift = tl.where(above == -float("inf"), 0.0, above)  # nothing but -inf so far
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(z - shift), 0)
        highest = above
    tl.store(nll + row, tl.where(known, tl.log(total) + highest - chosen, 0.0))
    if WRITE:
        errors += row * vocabulary
        scale = 1.0
        if SCALED:
            scale = tl.load(factor + row)
        for first in range(0, vocabulary, BLOCK):
            j = first + tl.arange(0, BLOCK)
            z = tl.load(logits + j, mask=j < vocabulary, other=-float("inf")).to(tl.float32)
            error = tl.exp(z - highest) / total - tl.where(j == token, 1.0, 0.0)
            error = tl.where(known, error * scale, 0.0)
            tl.store(errors + j, error.to(errors.dtype.element_ty), mask=j < vocabulary)


def nll_of_logits(
    logits: Tensor,
    wanted: Tensor,
    ignored: int,
    errors: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """Returns -log p of tokens, nats, shape (P,), float32; no gradients.

    Args:
        logits: Their logits, shape (P, V), contiguous.
        wanted: The tokens, shape (P,), int64, contiguous.
        ignored: Instead of a token: its loss is 0.
        errors: Where to put the gradient of each loss, shape (P, V), contiguous; it may be ``logits``.
        factor: What that gradient is multiplied by, shape (P,), float32, of any strides; None for 1.
    """
    tokens, vocabulary = logits.shape
    nll = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    if not tokens:
        return nll
    write, scaled = errors is not None, factor is not None
    out, factors = logits if errors is None else errors, nll if factor is None else factor.contiguous()
    block = min(_BLOCK, triton.next_power_of_2(vocabulary))
    launch(
        _nll_kernel, _compiled, (logits.device, vocabulary, logits.dtype, out.dtype, write, scaled),
        (tokens, 1, 1), (logits, wanted, out, factors),
        (nll, out, logits, wanted, factors, vocabulary, ignored, write, scaled, block),
        num_warps=max(1, min(16, block // 256)),
    )  # fmt: skip
    return nll
