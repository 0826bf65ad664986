"""A weighted sum of Kronecker products: as a matrix, and applied to an input.

With row-major reshapes, ``(A ⊗ B) x = flatten(A X Bᵀ)`` where X is x as an n_a × n_b matrix. Where
n_a·n_b > n the input is zero-padded, where it is smaller the input's tail is dropped; where m_a·m_b > m the
output is cut, where it is smaller its tail is zero. Both are what cutting or zero-filling the matrix
``A ⊗ B`` to m × n gives.

Four backends compute the same product:
    structured  two small products per shape of component; never forms an m × n matrix
    dense       forms ΔW for the time of one product; its cost hardly grows with r
    thin        two thin products, for components of small ranks
    fused       as dense, with Triton kernels that build ΔW and project its gradient in one or two launches

Source: MoKA, arXiv 2508.03527; the identity is Van Loan, "The ubiquitous Kronecker product" (2000).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from moka_pl.ops.dense import add_delta_
from moka_pl.ops.dispatch import Backend, updates_alone
from moka_pl.ops.layout import Shape, exact_rank, group_equal, unpack
from moka_pl.ops.merged_forward import MergedForward
from moka_pl.ops.operators import operator_product


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


def delta_rows(
    ids: Tensor, weights: Tensor, left: Tensor, right: Tensor, shapes: tuple[Shape, ...], n: int
) -> Tensor:
    """Looks up rows of ``ΔW = Σ_i w_i (A_i ⊗ B_i)``, shape (..., n), in the factors' dtype; differentiable.

    Row k of A ⊗ B is the Kronecker product of row ⌊k / m_b⌋ of A and row k mod m_b of B: the m × n matrix is
    never formed, and what is kept for the backward pass is the two rows of each component.

    Args:
        ids: Rows k, of any shape.
        weights: Weights w, shape (r,).
        left: Packed left factors (see :mod:`moka_pl.ops.layout`).
        right: Packed right factors.
        shapes: r shapes.
        n: Columns of ΔW.
    """
    rows, pairs = ids.flatten(), unpack(left, right, shapes)  # (T,)
    out = right.new_zeros(len(rows), n)  # (T, n)
    for shape, members in group_equal(shapes).items():
        outer, inner = rows // shape.m_b, rows % shape.m_b
        inside = (outer < shape.m_a).to(right.dtype)[:, None]  # rows beyond the product are 0
        outer = outer.clamp(max=shape.m_a - 1)
        a_rows, b_rows = [], []
        for i in members:
            a, b = pairs[i]
            a_row = F.one_hot(outer, shape.m_a).to(b) if a is None else F.embedding(outer, a)  # (T, n_a)
            a_rows.append(a_row * (inside * weights[i]))
            b_rows.append(F.embedding(inner, b))  # (T, n_b)
        product = torch.stack(a_rows, 2) @ torch.stack(b_rows, 1)  # (T, n_a, n_b)
        product = product.flatten(1)[:, :n]  # (T, ≤ n)
        out = out + (product if shape.cols >= n else F.pad(product, (0, n - shape.cols)))
    return out.view(*ids.shape, n)


def lora_factors(
    weights: Tensor, left: Tensor, right: Tensor, shapes: tuple[Shape, ...], m: int, n: int
) -> tuple[Tensor, Tensor]:
    """Factorises ``ΔW = Σ_i w_i (A_i ⊗ B_i)`` as a LoRA: lora_A, shape (R, n), and lora_B, shape (m, R).

    A factor with fewer rows than columns is I A, another one A I. With A_i = P Q and B_i = S T split like
    that, ``A_i ⊗ B_i = (P ⊗ S)(Q ⊗ T)``, whose inner size is the rank of the shape. Cutting or zero-filling
    the product to m × n does so to the rows of P ⊗ S and the columns of Q ⊗ T. Components lie side by side,
    and w_i is in lora_B. Where their ranks add up to min(m, n) or more, one of both is ΔW, the other I.

    Args:
        weights: Weights w, shape (r,).
        left: Packed left factors (see :mod:`moka_pl.ops.layout`).
        right: Packed right factors.
        shapes: r shapes.
        m: Rows of the layer (output features).
        n: Columns of the layer (input features).
    """
    rank = exact_rank(shapes, m, n)
    if rank == min(m, n):
        delta, identity = delta_weight(weights, left, right, shapes, m, n), torch.eye(rank).to(right)
        return (delta, identity) if rank == m else (identity, delta)
    lora_a, lora_b = right.new_zeros(rank, n), right.new_zeros(m, rank)
    row = 0
    for weight, (a, b), shape in zip(weights, unpack(left, right, shapes), shapes, strict=True):
        (p, q), (s, t) = _halves(torch.eye(shape.m_a).to(b) if a is None else a), _halves(b)
        rows = slice(row, row := row + shape.rank)
        outputs, inputs = torch.kron(p, s)[:m], torch.kron(q, t)[:, :n]  # (≤ m, rank), (rank, ≤ n)
        lora_b[: len(outputs), rows] = weight * outputs
        lora_a[rows, : inputs.shape[1]] = inputs
    return lora_a, lora_b


def _halves(factor: Tensor) -> tuple[Tensor, Tensor]:
    """Splits a factor into itself and an identity, of the smaller of its sizes in between."""
    identity = torch.eye(min(factor.shape)).to(factor)
    return (identity, factor) if len(factor) <= factor.shape[1] else (factor, identity)


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
    if torch.compiler.is_compiling():
        return operator_product(x, weights, left, right, None, shapes, out_features, backend)
    updates = updates_alone(x, weights, left, right, shapes, out_features, backend)
    out: Tensor = MergedForward.apply(  # type: ignore[no-untyped-call]
        x, weights, left, right, None, updates, torch.is_grad_enabled()
    )  # (T, m)
    return out.view(*x.shape[:-1], out_features)
