"""The components' weights w from gate logits, inside a kernel.

Reference: :func:`moka_pl.ops.gating.gates_of`, times the scaling.
"""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.gating import Gating
from moka_pl.ops.triton.plan import Plan


class Gates(NamedTuple):
    """Where a kernel takes the weights w of the components from.

    Attributes:
        values: Gate logits g, or the weights themselves, (r,), float32.
        scaling: s.
        gating: ``softmax`` for ``w = s softmax(g)``, ``sigmoid`` for ``w_i = s sigmoid(g_i)``, ``none`` for
            ``w = s values``.
    """

    values: Tensor
    scaling: float = 1.0
    gating: Gating = "none"


def layer_gates(plan: Plan, logits: Tensor | None, scaling: float, gating: Gating = "softmax") -> Gates:
    """Returns the weights s α of a layer's components; s/r where it has no gates.

    Args:
        plan: The layer's plan.
        logits: Gate logits g, (r,), or None.
        scaling: s.
        gating: How gate logits make α.
    """
    scaling = float(scaling)  # for whole numbers other kernels would be compiled
    if logits is None:
        return Gates(plan.uniform, scaling)
    if gating == "sigmoid":  # α_i = (2/r) sigmoid(g_i)
        return Gates(logits, scaling * 2 / len(plan.shapes), gating)
    return Gates(logits, scaling, gating)


@triton.jit  # type: ignore[untyped-decorator]
def softmax_parts(values, R: tl.constexpr, PADDED: tl.constexpr, GATING: tl.constexpr):  # type: ignore[no-untyped-def]
    """The largest logit and the sum of exponentials; 0 and 1 where there is no softmax."""
    top = 0.0
    total = 1.0
    if GATING == "softmax":
        i = tl.arange(0, PADDED)
        logits = tl.load(values + i, mask=i < R, other=-float("inf"))
        top = tl.max(logits, 0)
        total = tl.sum(tl.exp(logits - top), 0)
    return top, total


@triton.jit  # type: ignore[untyped-decorator]
def weight(values, c, scaling, top, total, GATING: tl.constexpr):  # type: ignore[no-untyped-def]
    """The weight of component c."""
    value = tl.load(values + c)
    if GATING == "softmax":
        value = tl.exp(value - top) / total
    elif GATING == "sigmoid":
        value = 1 / (1 + tl.exp(-value))
    return value * scaling


@triton.jit  # type: ignore[untyped-decorator]
def logits_gradient(  # type: ignore[no-untyped-def]
    grad, values, scaling, R: tl.constexpr, PADDED: tl.constexpr, GATING: tl.constexpr
):
    """The gradient of ``Gates.values``, (PADDED,), for that of the weights w.

    Reference: :func:`moka_pl.ops.gating.logits_gradient`.
    """
    c = tl.arange(0, PADDED)
    grad *= scaling
    if GATING == "softmax":
        # dα_i/dg_j = α_i (δ_ij - α_j)
        highest, sum_ = softmax_parts(values, R, PADDED, GATING)
        alpha = tl.exp(tl.load(values + c, mask=c < R, other=-float("inf")) - highest) / sum_
        grad = alpha * (grad - tl.sum(alpha * tl.where(c < R, grad, 0.0), 0))
    elif GATING == "sigmoid":
        value = 1 / (1 + tl.exp(-tl.load(values + c, mask=c < R, other=0.0)))
        grad *= value * (1 - value)
    return grad
