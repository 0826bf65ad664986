"""Pure tensor functions of a weighted sum of Kronecker products.

Notation:
    x       input, shape (..., n)
    A_i     left factor, shape (m_a, n_a); ``None`` stands for an identity matrix (MoKA_s)
    B_i     right factor, shape (m_b, n_b)
    w       weights of the components, shape (r,); the caller folds gates and scaling into them
    ΔW      Σ_i w_i (A_i ⊗ B_i), cut or zero-filled to m × n
    T       number of tokens, the product of the leading dimensions of x

With row-major reshapes, ``(A ⊗ B) x = flatten(A X Bᵀ)`` where X is x as an n_a × n_b matrix. Where
n_a·n_b > n the input is zero-padded, where it is smaller the input's tail is dropped; where m_a·m_b > m the
output is cut, where it is smaller its tail is zero. Both are what cutting or zero-filling the matrix
``A ⊗ B`` to m × n gives.

Three ways lead to the same product:
    structured  one pair of small products per component; never forms an m × n matrix
    dense       forms ΔW for the time of one product; its cost hardly grows with r
    fused       the same with Triton kernels that build ΔW and project its gradient in one to two launches

Source: MoKA, arXiv 2508.03527; the identity is Van Loan, "The ubiquitous Kronecker product" (2000).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moka_pl.backends import Backend, resolve_backend
from moka_pl.grouped import add_delta_, project
from moka_pl.packing import Pairs, pack, unpack
from moka_pl.shape import Shape


def _fit(x: Tensor, size: int) -> Tensor:
    """Cuts or zero-fills the last dimension to ``size``."""
    missing = size - x.shape[-1]
    if missing > 0:
        return F.pad(x, (0, missing))
    return x[..., :size] if missing < 0 else x


def _left_first(shape: Shape) -> bool:
    """Whether (A X) Bᵀ takes fewer multiply-adds than A (X Bᵀ)."""
    left = shape.m_a * shape.n_a * shape.n_b + shape.m_a * shape.n_b * shape.m_b
    right = shape.n_a * shape.n_b * shape.m_b + shape.m_a * shape.n_a * shape.m_b
    return left <= right


def _product(x: Tensor, a: Tensor | None, b: Tensor, shape: Shape, out_features: int) -> Tensor:
    """One component's ``(A ⊗ B) x`` for x of shape (T, n); returns (T, m)."""
    grid = _fit(x, shape.cols).reshape(-1, shape.n_a, shape.n_b)  # (T, n_a, n_b)
    if a is None:
        out = grid @ b.mT  # (T, m_a, m_b)
    elif _left_first(shape):
        out = (a @ grid) @ b.mT  # (T, m_a, m_b)
    else:
        out = a @ (grid @ b.mT)  # (T, m_a, m_b)
    return _fit(out.flatten(1), out_features)  # (T, m)


def structured_forward(
    x: Tensor,
    weights: Tensor,
    factors: Sequence[tuple[Tensor | None, Tensor]],
    shapes: Sequence[Shape],
    m: int,
) -> Tensor:
    """Computes ``Σ_i w_i (A_i ⊗ B_i) x`` component by component.

    Products and sum run in the factors' dtype and are rounded once: in half precision every intermediate
    would add an error of its own, several times that of one matrix product.

    Args:
        x: Input, shape (T, n).
        weights: Weights w, shape (r,).
        factors: r pairs (A_i or None, B_i).
        shapes: r shapes.
        m: Number of output features.

    Returns:
        The product, shape (T, m), in the dtype of ``x``.
    """
    wide = torch.promote_types(x.dtype, factors[0][1].dtype)
    grid = x.to(wide)
    total = grid.new_zeros(x.shape[0], m)
    for w, (a, b), shape in zip(weights.unbind(), factors, shapes, strict=True):
        total += _product(grid, None if a is None else a.to(wide), (w * b).to(wide), shape, m)
    return total.to(x.dtype)  # (T, m)


def structured_backward(
    grad: Tensor,
    x: Tensor,
    weights: Tensor,
    factors: Sequence[tuple[Tensor | None, Tensor]],
    shapes: Sequence[Shape],
    needs_input_grad: bool = True,
) -> tuple[Tensor | None, Tensor, list[tuple[Tensor | None, Tensor]]]:
    """Gradients of :func:`structured_forward`.

    With X = x as a matrix and G = grad as a matrix (per token): ``dA = w Σ_t G B Xᵀ``,
    ``dB = w Σ_t Gᵀ A X``, ``dX = w Aᵀ G B``, and since the product is linear in B,
    ``dw_i = <dB_i / w_i, B_i>`` needs no second forward.

    Returns:
        Gradients for x (T, n), in its dtype, for w (r,) and for every factor pair.
    """
    n, dtype = x.shape[1], x.dtype
    wide = torch.promote_types(dtype, factors[0][1].dtype)
    x, grad = x.to(wide), grad.to(wide)
    grad_x = torch.zeros_like(x) if needs_input_grad else None
    grad_weights = torch.empty_like(weights)
    grad_factors: list[tuple[Tensor | None, Tensor]] = []
    for i, ((a, b), shape) in enumerate(zip(factors, shapes, strict=True)):
        grid = _fit(x, shape.cols).reshape(-1, shape.n_a, shape.n_b)  # (T, n_a, n_b)
        out = _fit(grad, shape.rows).reshape(-1, shape.m_a, shape.m_b)  # (T, m_a, m_b)
        back = out @ b.to(wide)  # (T, m_a, n_b)
        grad_a = None
        hidden = grid  # (T, n_a, n_b)
        if a is not None:
            hidden = a.to(wide) @ grid  # (T, m_a, n_b)
            # Σ over tokens and n_b as one matrix product.
            grad_a = back.transpose(0, 1).flatten(1) @ grid.transpose(0, 1).flatten(1).mT  # (m_a, n_a)
            grad_a = grad_a.to(a.dtype) * weights[i]
            back = a.to(wide).mT @ back  # (T, n_a, n_b)
        grad_b = (out.flatten(0, 1).mT @ hidden.flatten(0, 1)).to(b.dtype)  # (m_b, n_b)
        grad_weights[i] = (grad_b * b).sum()
        grad_factors.append((grad_a, grad_b * weights[i]))
        if grad_x is not None:
            grad_x += _fit(back.flatten(1), n) * weights[i]
    return None if grad_x is None else grad_x.to(dtype), grad_weights, grad_factors


def delta_weight(
    weights: Tensor,
    factors: Sequence[tuple[Tensor | None, Tensor]],
    shapes: Sequence[Shape],
    m: int,
    n: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Builds ``ΔW = Σ_i w_i (A_i ⊗ B_i)``, cut or zero-filled to m × n.

    Args:
        weights: Weights w, shape (r,).
        factors: r pairs (A_i or None, B_i).
        shapes: r shapes.
        m: Rows of the layer (output features).
        n: Columns of the layer (input features).
        dtype: Result dtype; the sum itself runs in the factors' dtype.

    Returns:
        ΔW, shape (m, n).
    """
    left, right = pack(factors)
    total = right.new_zeros(m, n)
    return add_delta_(total, left, right, weights, tuple(shapes)).to(dtype or total.dtype)  # (m, n)


def project_gradient(
    grad: Tensor,
    weights: Tensor,
    factors: Sequence[tuple[Tensor | None, Tensor]],
    shapes: Sequence[Shape],
) -> tuple[Tensor, Pairs]:
    """Pulls a gradient with respect to ΔW back to weights and factors (see :func:`moka_pl.grouped.project`).

    Args:
        grad: ∂L/∂ΔW, shape (m, n).
        weights: Weights w, shape (r,).
        factors: r pairs (A_i or None, B_i).
        shapes: r shapes.

    Returns:
        Gradients for w and for every factor pair.
    """
    grad_left, grad_right, grad_weights = project(grad, *pack(factors), weights, tuple(shapes))
    return grad_weights, unpack(grad_left, grad_right, tuple(shapes))


class _KroneckerSum(torch.autograd.Function):
    """``Σ_i w_i (A_i ⊗ B_i) x`` that saves its input, the weights and the factors, and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weights: Tensor,
        shapes: tuple[Shape, ...],
        m: int,
        dense: bool,
        *flat: Tensor | None,
    ) -> Tensor:
        factors = _pairs(flat)
        ctx.save_for_backward(x, weights, *flat)
        ctx.shapes, ctx.dense = shapes, dense
        # Every product here has the dtype it should have; autocast would build ΔW in half precision.
        with torch.autocast(x.device.type, enabled=False):
            if dense:
                return x @ delta_weight(weights, factors, shapes, m, x.shape[1], x.dtype).mT  # (T, m)
            return structured_forward(x, weights, factors, shapes, m)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, *flat = ctx.saved_tensors
        factors = _pairs(flat)
        need_x = ctx.needs_input_grad[0]
        if ctx.dense:
            m, n = grad.shape[1], x.shape[1]
            grad_x = (
                grad @ delta_weight(weights, factors, ctx.shapes, m, n, x.dtype) if need_x else None
            )  # (T, n)
            grad_weights, grad_factors = project_gradient(grad.mT @ x, weights, factors, ctx.shapes)
        else:
            grad_x, grad_weights, grad_factors = structured_backward(
                grad, x, weights, factors, ctx.shapes, need_x
            )
        return grad_x, grad_weights, None, None, None, *(g for pair in grad_factors for g in pair)


def _pairs(flat: Sequence[Tensor | None]) -> list[tuple[Tensor | None, Tensor]]:
    """Regroups A_1, B_1, A_2, B_2, … into pairs."""
    pairs: list[tuple[Tensor | None, Tensor]] = []
    for a, b in zip(flat[::2], flat[1::2], strict=True):
        assert b is not None
        pairs.append((a, b))
    return pairs


def kronecker_linear(
    x: Tensor,
    weights: Tensor,
    factors: Sequence[tuple[Tensor | None, Tensor]],
    shapes: Sequence[Shape],
    out_features: int,
    backend: Backend = "auto",
) -> Tensor:
    """Computes ``Σ_i w_i (A_i ⊗ B_i) x``, differentiable in x, w and all factors.

    Args:
        x: Input, shape (..., n), in the compute dtype (the result and the products have it too).
        weights: Weights w, shape (r,): gates times scaling.
        factors: r pairs (A_i or None for an identity, B_i), usually float32.
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
    rows = x.reshape(-1, x.shape[-1])  # (T, n)
    dtypes = {f.dtype for pair in factors for f in (*pair, weights) if f is not None}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float64  # mixed ones are not for the kernels
    way = resolve_backend(backend, rows, dtype, shapes, out_features, rows.shape[1])
    if way == "fused":
        from moka_pl.kernels import FusedSum, make_plan

        left, right = pack(factors)
        plan = make_plan(tuple(shapes), out_features, rows.shape[1], x.device)
        with torch.autocast(x.device.type, enabled=False):
            fused: Tensor = FusedSum.apply(rows, weights, left, right, plan)  # type: ignore[no-untyped-call]
        return fused.reshape(*tokens, out_features)
    flat = [factor for pair in factors for factor in pair]
    out: Tensor = _KroneckerSum.apply(  # type: ignore[no-untyped-call]
        rows, weights, tuple(shapes), out_features, way == "dense", *flat
    )  # (T, m)
    return out.reshape(*tokens, out_features)
