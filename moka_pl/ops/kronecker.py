"""A weighted sum of Kronecker products: as a matrix, and applied to an input.

With row-major reshapes, ``(A ⊗ B) x = flatten(A X Bᵀ)`` where X is x as an n_a × n_b matrix. Where
n_a·n_b > n the input is zero-padded, where it is smaller the input's tail is dropped; where m_a·m_b > m the
output is cut, where it is smaller its tail is zero. Both are what cutting or zero-filling the matrix
``A ⊗ B`` to m × n gives.

Four backends compute the same product:
    structured  two small products per shape of component; never forms an m × n matrix
    dense       forms ΔW for the time of one product; its cost hardly grows with r
    thin        two thin products, for components of small ranks
    fused       the same with Triton kernels that build ΔW and project its gradient in one to two launches

Source: MoKA, arXiv 2508.03527; the identity is Van Loan, "The ubiquitous Kronecker product" (2000).
"""

import torch
from torch import Tensor

from moka_pl.ops.dense import add_delta_
from moka_pl.ops.dispatch import Backend, resolve_backend
from moka_pl.ops.gating import Gating
from moka_pl.ops.layout import Shape
from moka_pl.ops.merged_forward import DenseUpdates, MergedForward, StructuredUpdates
from moka_pl.ops.thin import ThinUpdates

#: What computes an update, by backend.
UPDATES: dict[str, type[DenseUpdates]] = {
    "structured": StructuredUpdates,
    "dense": DenseUpdates,
    "thin": ThinUpdates,
}


def delta_weight(
    weights: Tensor, left: Tensor, right: Tensor, shapes: tuple[Shape, ...], m: int, n: int
) -> Tensor:
    """Builds ``ΔW = Σ_i w_i (A_i ⊗ B_i)``, shape (m, n), in the factors' dtype; differentiable.

    Args:
        weights: Weights w, shape (r,).
        left: Packed left factors (see :mod:`moka_pl.ops.layout`).
        right: Packed right factors.
        shapes: r shapes.
        m: Rows of the layer (output features).
        n: Columns of the layer (input features).
    """
    return add_delta_(right.new_zeros(m, n), left, right, weights, shapes)


def kronecker_linear(
    x: Tensor,
    weights: Tensor,
    left: Tensor,
    right: Tensor,
    shapes: tuple[Shape, ...],
    out_features: int,
    backend: Backend = "auto",
) -> Tensor:
    """Computes ``Σ_i w_i (A_i ⊗ B_i) x``, shape (..., m), differentiable in x, w and both packed vectors.

    Args:
        x: Input, shape (..., n), in the compute dtype (the result and the products have it too).
        weights: Weights w, shape (r,): gates times scaling.
        left: Packed left factors (see :mod:`moka_pl.ops.layout`), usually float32.
        right: Packed right factors, likewise.
        shapes: r shapes.
        out_features: m.
        backend: ``"structured"``, ``"dense"``, ``"thin"`` and ``"fused"`` (which fall back to dense, with a
            warning, for other shapes, and where Triton cannot run), or ``"auto"`` for the cheapest at this
            size on this device.

    Raises:
        ConfigError: For an unknown backend.
    """
    n = x.shape[-1]
    # Mixed dtypes are not for the kernels.
    dtype = right.dtype if weights.dtype == left.dtype == right.dtype else torch.float64
    resolved = resolve_backend(backend, x, dtype, shapes, out_features)
    gating: Gating = "none"  # w in the place of the gates
    alone = (shapes, out_features, n, 1.0, None, False, gating)
    updates: DenseUpdates
    if resolved == "fused":
        from moka_pl.ops.triton import FusedUpdates, make_plan

        updates = FusedUpdates(*alone, make_plan(shapes, out_features, n, x.device))
    else:
        updates = UPDATES[resolved](*alone)
    out: Tensor = MergedForward.apply(x.reshape(-1, n), weights, left, right, None, updates)  # type: ignore[no-untyped-call]
    return out.reshape(*x.shape[:-1], out_features)
