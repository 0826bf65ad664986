"""Chooses the backend of a layer's update, and says where the Triton kernels can run."""

import os
import warnings
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

from moka_pl.errors import ConfigError, MokaWarning
from moka_pl.ops.gating import Gating
from moka_pl.ops.layout import Shape, group_equal
from moka_pl.ops.merged_forward import DenseUpdates, StructuredUpdates
from moka_pl.ops.thin import ThinUpdates, hidden_size, is_thin, thin_pays

Backend = Literal["auto", "structured", "dense", "thin", "fused"]
Resolved = Literal["structured", "dense", "thin", "fused"]

BACKENDS: tuple[str, ...] = get_args(Backend)

#: What computes an update, by backend.
UPDATES: dict[str, type[DenseUpdates]] = {
    "structured": StructuredUpdates,
    "dense": DenseUpdates,
    "thin": ThinUpdates,
}

_HAS_TRITON = find_spec("triton") is not None

#: Tokens below which, on a GPU and without gradients, building ΔW costs more than kernels for few tokens.
DECODE_TOKENS = 32

#: Bytes of a token's hidden numbers up to which the thin kernels' tiles fit, and the oldest GPU for these.
_WIDEST, _OLDEST = 256, (8, 0)


def resolve_backend(
    backend: Backend, x: Tensor, factors: torch.dtype, shapes: Sequence[Shape], m: int
) -> Resolved:
    """Chooses the backend for an update of ``x``: ``"fused"`` only where its kernels can run.

    ``"thin"`` is chosen only for components of small ranks: by ``"auto"`` for all of these, and by
    ``"fused"`` on a GPU, where it has kernels of its own.

    Args:
        backend: The requested backend.
        x: Input, shape (..., n).
        factors: Dtype of factors and weights.
        shapes: r shapes.
        m: Output features.

    Raises:
        ConfigError: For an unknown backend.
    """
    fixed = fixed_backend(backend, x, factors, shapes, m)
    if fixed is not None:
        return fixed
    n = x.shape[-1]
    return pick_backend(x.numel() // n, tuple(shapes), m, n)


def fixed_backend(
    backend: Backend, x: Tensor, factors: torch.dtype, shapes: Sequence[Shape], m: int
) -> Resolved | None:
    """As :func:`resolve_backend`; None where the number of tokens decides, between structured and dense.

    Compilers trace this, and would warn of a cache.

    Args:
        backend: The requested backend.
        x: Input, shape (..., n).
        factors: Dtype of factors and weights.
        shapes: r shapes.
        m: Output features.
    """
    pays = thin_pays if torch.compiler.is_compiling() else is_thin
    thin = pays(tuple(shapes), m, x.shape[-1])
    if backend == "auto":
        if thin:
            return "thin"
        # However few the tokens: a step of structured products takes many times as many launches.
        return "fused" if x.is_cuda and can_fuse(x, factors, shapes, m) else None
    if backend == "fused":
        if can_fuse(x, factors, shapes, m):
            return "thin" if thin and x.is_cuda else "fused"
        _warn_unfused()
        return "dense"
    if backend == "thin" and not thin:
        _warn_not_thin()
        return "dense"
    if backend not in BACKENDS:
        raise ConfigError(f"unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}")
    return backend


def updates_alone(
    x: Tensor,
    weights: Tensor,
    left: Tensor,
    right: Tensor,
    shapes: tuple[Shape, ...],
    m: int,
    backend: Backend,
) -> DenseUpdates:
    """Returns what computes ``Σ_i w_i (A_i ⊗ B_i) x`` without a frozen layer, w in the place of the gates.

    Args:
        x: Input, shape (..., n).
        weights: w, shape (r,).
        left: Packed left factors.
        right: Packed right factors.
        shapes: r shapes.
        m: Output features.
        backend: The requested backend.
    """
    n = x.shape[-1]
    # Mixed dtypes are not for the kernels.
    dtype = right.dtype if weights.dtype == left.dtype == right.dtype else torch.float64
    resolved = resolve_backend(backend, x, dtype, shapes, m)
    gating: Gating = "none"
    alone = (shapes, m, n, 1.0, None, False, gating)
    if resolved == "fused":
        from moka_pl.ops.triton import FusedUpdates, make_plan

        return FusedUpdates(*alone, make_plan(shapes, m, n, x.device))
    if resolved == "thin" and can_fuse_thin(x, x.dtype, dtype, shapes, m):
        from moka_pl.ops.triton import FusedThinUpdates, make_thin_plan

        return FusedThinUpdates(*alone, plan=make_thin_plan(shapes, m, n, x.device))
    return UPDATES[resolved](*alone)


def on_gpu_with_triton(x: Tensor) -> bool:
    """Whether Triton's kernels can run where a tensor lies."""
    return x.is_cuda and _HAS_TRITON


def can_fuse(x: Tensor, factors: torch.dtype, shapes: Sequence[Shape], m: int) -> bool:
    """Whether the Triton kernels can run: on CUDA (or under Triton's interpreter), with float32 factors.

    The left factors must be all identities, or none.

    Args:
        x: Input, shape (..., n).
        factors: Dtype of factors and weights.
        shapes: r shapes.
        m: Output features.
    """
    device = x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"
    one_kind = len({shape.identity for shape in shapes}) == 1
    return device and factors == torch.float32 and one_kind and m * x.shape[-1] < 2**31 and _HAS_TRITON


def can_fuse_thin(
    x: Tensor, compute: torch.dtype, factors: torch.dtype, shapes: tuple[Shape, ...], m: int
) -> bool:
    """Whether the Triton kernels for thin products serve an update of x on its GPU.

    Args:
        x: Input, shape (..., n).
        compute: Dtype of the products.
        factors: Dtype of factors and weights.
        shapes: r shapes of small ranks.
        m: Output features.
    """
    if not x.is_cuda or compute not in (torch.bfloat16, torch.float32):
        return False
    narrow = hidden_size(shapes) * compute.itemsize <= _WIDEST
    return narrow and _capability(x.device) >= _OLDEST and can_fuse(x, factors, shapes, m)


@lru_cache(maxsize=4096)
def pick_backend(tokens: int, shapes: tuple[Shape, ...], m: int, n: int) -> Literal["structured", "dense"]:
    """Chooses the cheaper backend for a forward and backward pass, by counting multiply-adds.

    Both work on all components of a shape at once. Dense takes T·m·n for the gradient of ΔW, and for
    each shape builds ΔW, once or twice, and projects its gradient: bound by memory. Structured takes seven
    products with small factors for each shape, moves the activations for each and transposes them. The other
    numbers turn memory and calls into multiply-adds. They fit float32 on two CPU cores for layers of
    192 × 576 to 4096 × 4096, 1 to 20 components and 8 to 1024 tokens: what is picked took at most 15% longer
    than the other, and mostly less.

    Args:
        tokens: T.
        shapes: r shapes.
        m: Output features.
        n: Input features.
    """
    dense = tokens * m * n
    structured = 20e6 + tokens * 210 * (m + n)
    for shape, members in group_equal(shapes).items():
        product = shape.m_a * shape.m_b * shape.n_b if shape.identity else min(shape.costs)
        dense += (120 if shape.identity else 180) * m * n
        structured += 6e6 + tokens * (3.5 * len(members) * product + 150 * (m + n))
    return "dense" if dense <= structured else "structured"


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@cache
def _warn_unfused() -> None:
    warnings.warn(
        "backend: fused needs a CUDA device, Triton, float32 factors, and either only or no identity left "
        "factors; using backend: dense instead",
        MokaWarning,
        stacklevel=4,
    )


@cache
def _warn_not_thin() -> None:
    warnings.warn(
        "backend: thin needs components of small ranks, without identities; using backend: dense instead",
        MokaWarning,
        stacklevel=4,
    )
