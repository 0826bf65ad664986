"""The components' weights w from gate logits, inside a kernel."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moka_pl.kernels.plan import Plan


class Gates(NamedTuple):
    """Where a kernel takes the weights w of the components from.

    Attributes:
        values: Gate logits g, or the weights themselves, (r,), float32.
        scaling: s.
        softmax: Whether ``w = s softmax(g)``; otherwise ``w = s values``.
    """

    values: Tensor
    scaling: float = 1.0
    softmax: bool = False


def layer_gates(plan: Plan, logits: Tensor | None, scaling: float) -> Gates:
    """The weights of a layer's components: ``s softmax(g)``, or s/r where it has no gates."""
    return Gates(plan.uniform, scaling) if logits is None else Gates(logits, scaling, softmax=True)


@triton.jit  # type: ignore[untyped-decorator]
def softmax_parts(values, R: tl.constexpr, PADDED: tl.constexpr, SOFTMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit and the sum of exponentials; without gates 0 and 1."""
    top = 0.0
    total = 1.0
    if SOFTMAX:
        i = tl.arange(0, PADDED)
        logits = tl.load(values + i, mask=i < R, other=-float("inf"))
        top = tl.max(logits, 0)
        total = tl.sum(tl.exp(logits - top), 0)
    return top, total


@triton.jit  # type: ignore[untyped-decorator]
def weight(values, c, scaling, top, total, SOFTMAX: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of component c."""
    value = tl.load(values + c)
    if SOFTMAX:
        value = tl.exp(value - top) / total
    return value * scaling
