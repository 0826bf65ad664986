"""A weighted sum of Kronecker products as a matrix, and its product with an input.

With row-major reshapes, ``(A ⊗ B) x = flatten(A X Bᵀ)`` where X is x as an n_a × n_b matrix. Where
n_a·n_b > n the input is zero-padded, where it is smaller the input's tail is dropped; where m_a·m_b > m the
output is cut, where it is smaller its tail is zero. Both are what cutting or zero-filling the matrix
``A ⊗ B`` to m × n gives.

Three backends compute the same product:
    structured  two small products per shape of component; never forms an m × n matrix
    dense       forms ΔW for the time of one product; its cost hardly grows with r
    fused       the same with Triton kernels that build ΔW and project its gradient in one to two launches

Source: MoKA, arXiv 2508.03527; the identity is Van Loan, "The ubiquitous Kronecker product" (2000).
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moka_pl.ops.dense import add_delta_, project
from moka_pl.ops.dispatch import Backend, resolve_backend
from moka_pl.ops.layout import Shape
from moka_pl.ops.structured import add_update_, transposed, update_backward

if TYPE_CHECKING:
    from moka_pl.ops.triton import Plan


def delta_weight(
    weights: Tensor, left: Tensor, right: Tensor, shapes: tuple[Shape, ...], m: int, n: int
) -> Tensor:
    """Builds ``ΔW = Σ_i w_i (A_i ⊗ B_i)``, cut or zero-filled to m × n; differentiable.

    Args:
        weights: Weights w, shape (r,).
        left: Packed left factors (see :mod:`moka_pl.ops.layout`).
        right: Packed right factors.
        shapes: r shapes.
        m: Rows of the layer (output features).
        n: Columns of the layer (input features).

    Returns:
        ΔW, shape (m, n), in the factors' dtype.
    """
    return add_delta_(right.new_zeros(m, n), left, right, weights, shapes)


class _KroneckerSum(torch.autograd.Function):
    """``Σ_i w_i (A_i ⊗ B_i) x`` that saves its input, the weights and the factors, and nothing else.

    Structured products and their sum run in the factors' dtype and are rounded once: in half precision every
    intermediate would add an error of its own, several times that of one matrix product.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        left: Tensor,
        right: Tensor,
        shapes: tuple[Shape, ...],
        m: int,
        structured: bool,
        plan: "Plan | None",
    ) -> Tensor:
        """Maps x of shape (T, n) to (T, m): structured, or with ΔW built (by the kernels if planned)."""
        ctx.save_for_backward(x, weights, left, right)
        ctx.shapes, ctx.structured, ctx.plan = shapes, structured, plan
        # Every product here has the dtype it should have; autocast would build ΔW in half precision.
        with torch.autocast(x.device.type, enabled=False):
            if not structured:
                return x @ _delta(ctx, x, weights, left, right, m).mT  # (T, m)
            wide = torch.promote_types(x.dtype, right.dtype)
            out = torch.zeros(m, x.shape[0], dtype=wide, device=x.device)
            add_update_(out, transposed(x, wide), left.to(wide), right.to(wide), weights.to(wide), shapes)
            return transposed(out, x.dtype)  # (T, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, w and the packed factors, for that of the result, (T, m)."""
        x, weights, left, right = ctx.saved_tensors
        needs_x, grad_x = ctx.needs_input_grad[0], None
        if ctx.structured:
            wide = torch.promote_types(x.dtype, right.dtype)
            tokens, n = x.shape
            total = torch.zeros(n, tokens, dtype=wide, device=x.device) if needs_x else None
            columns = transposed(grad, wide), transposed(x, wide)  # (m, T), (n, T)
            parts = left.to(wide), right.to(wide), weights.to(wide)
            grads = update_backward(*columns, *parts, ctx.shapes, total)
            grad_x = None if total is None else transposed(total, x.dtype)  # (T, n)
        else:
            if needs_x:
                grad_x = grad @ _delta(ctx, x, weights, left, right, grad.shape[1])  # (T, n)
            if ctx.plan is None:
                grads = project(grad.mT @ x, left, right, weights, ctx.shapes)
            else:
                from moka_pl.ops.triton import Gates, fused_projection

                grads = fused_projection(ctx.plan, grad.mT @ x, left, right, Gates(weights))
        grad_left, grad_right, grad_weights = grads
        leaves = grad_weights.to(weights.dtype), grad_left.to(left.dtype), grad_right.to(right.dtype)
        return grad_x, *leaves, None, None, None, None


def _delta(ctx: Any, x: Tensor, weights: Tensor, left: Tensor, right: Tensor, m: int) -> Tensor:
    """ΔW, (m, n), in the dtype of x; by the kernels where there is a plan."""
    if ctx.plan is None:
        return delta_weight(weights, left, right, ctx.shapes, m, x.shape[1]).to(x.dtype)
    from moka_pl.ops.triton import Gates, fused_weight

    return fused_weight(ctx.plan, left, right, Gates(weights), x.dtype)


def kronecker_linear(
    x: Tensor,
    weights: Tensor,
    left: Tensor,
    right: Tensor,
    shapes: tuple[Shape, ...],
    out_features: int,
    backend: Backend = "auto",
) -> Tensor:
    """Computes ``Σ_i w_i (A_i ⊗ B_i) x``, differentiable in x, w and both packed vectors.

    Args:
        x: Input, shape (..., n), in the compute dtype (the result and the products have it too).
        weights: Weights w, shape (r,): gates times scaling.
        left: Packed left factors (see :mod:`moka_pl.ops.layout`), usually float32.
        right: Packed right factors, likewise.
        shapes: r shapes.
        out_features: m.
        backend: ``"structured"``, ``"dense"``, ``"fused"`` (falls back to dense, with a warning, where Triton
            cannot run), or ``"auto"`` for the cheapest at this size on this device.

    Returns:
        The product, shape (..., m).

    Raises:
        ConfigError: For an unknown backend.
    """
    tokens = x.shape[:-1]
    flat = x.reshape(-1, x.shape[-1])  # (T, n)
    # Mixed dtypes are not for the kernels.
    dtype = right.dtype if weights.dtype == left.dtype == right.dtype else torch.float64
    resolved = resolve_backend(backend, flat, dtype, shapes, out_features, flat.shape[1])
    plan = None
    if resolved == "fused":
        from moka_pl.ops.triton import make_plan

        plan = make_plan(shapes, out_features, flat.shape[1], x.device)
    out: Tensor = _KroneckerSum.apply(  # type: ignore[no-untyped-call]
        flat, weights, left, right, shapes, out_features, resolved == "structured", plan
    )  # (T, m)
    return out.reshape(*tokens, out_features)
