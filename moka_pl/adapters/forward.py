"""Chooses how an adapted layer is computed: frozen layer and update apart, merged, or by decoding kernels."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moka_pl._compat import hook_count
from moka_pl.backbone.products.float8 import input_gradient, multiplies_in_float8
from moka_pl.backbone.quantization import (
    dense_weight,
    frozen_output,
    is_four_bit,
    is_quantised,
    kernel_weight,
    layer_compute_dtype,
    storage_device,
)
from moka_pl.ops.dispatch import (
    DECODE_TOKENS,
    UPDATES,
    Resolved,
    can_fuse,
    can_fuse_thin,
    resolve_backend,
)
from moka_pl.ops.merged_forward import DenseUpdates
from moka_pl.ops.thin import ThinUpdates, is_thin

if TYPE_CHECKING:
    from moka_pl.adapters.layer import MokaLayer, MokaLinear
    from moka_pl.ops.triton import WeightSource


#: The thin products of layers, and what they were made for: to make them takes as long as a launch.
_THIN: "WeakKeyDictionary[MokaLinear, tuple[tuple[Any, ...], DenseUpdates]]" = WeakKeyDictionary()


class ForwardPlan(NamedTuple):
    """How to compute a layer and its update as one operation.

    Attributes:
        updates: Computes it.
        compute: Dtype of the product.
        result: Dtype of the layer's output.
    """

    updates: DenseUpdates
    compute: torch.dtype
    result: torch.dtype


def merged_dtypes(
    adapted: "MokaLinear", x: Tensor, backend: Resolved | None, quantised: bool
) -> tuple[torch.dtype, torch.dtype] | None:
    """Returns the dtypes of ``(W + ΔW) x`` and of the layer's output; None where W and ΔW are to stay apart.

    They do where somebody listens to the frozen layer, trains it or keeps its weight elsewhere, or where
    W + ΔW would be rounded to half precision without the kernels' care for small updates. A compiler traces
    this: the number of tokens decides nothing.

    Args:
        adapted: The layer.
        x: Its input, shape (..., n).
        backend: Its backend; None for structured or dense.
        quantised: Whether the frozen layer is quantised.
    """
    layer = adapted.base_layer
    if _must_run_itself(layer, x.device, quantised):
        return None
    compute: torch.dtype
    autocast = _autocasts(x)
    if quantised:
        compute, result = layer_compute_dtype(layer, x), x.dtype
    elif type(layer) is nn.Linear:
        compute = result = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        if compute != layer.weight.dtype and not autocast:
            return None
    else:
        return None
    if backend == "fused":
        merges = compute in (torch.bfloat16, torch.float32)
    else:
        merges = backend == "thin" or (compute == adapted.moka_B.dtype and compute.itemsize >= 4)
    return (compute, result) if merges else None


def plan_forward(adapted: "MokaLinear", x: Tensor) -> ForwardPlan | None:
    """Plans to compute an adapted layer as ``(W + ΔW) x``; None where :func:`merged_dtypes` has none."""
    m = adapted.out_features
    backend = resolve_backend(adapted.backend, x, adapted.moka_B.dtype, adapted.shapes, m)
    dtypes = merged_dtypes(adapted, x, backend, is_quantised(adapted.base_layer))
    if dtypes is None:
        return None
    return ForwardPlan(merged_updates(adapted, x, dtypes[0], backend), *dtypes)


def merged_updates(adapted: "MokaLinear", x: Tensor, compute: torch.dtype, backend: Resolved) -> DenseUpdates:
    """Returns what computes ``(W + ΔW) x``.

    Args:
        adapted: The layer, which has :func:`merged_dtypes`.
        x: Its input, shape (..., n).
        compute: Dtype of the product.
        backend: Its backend.
    """
    layer, shapes = adapted.base_layer, adapted.shapes
    m, n = layer.out_features, layer.in_features
    if backend == "thin":
        fused = can_fuse_thin(x, compute, adapted.moka_B.dtype, shapes, m)
        return _thin_updates(adapted, compute, _autocasts(x), x.device, fused)
    weight = partial(dense_weight, layer, often=True)
    parts = (shapes, m, n, adapted.scaling, weight, is_quantised(layer), adapted.gating)
    if backend == "fused":
        from moka_pl.ops.triton import FusedUpdates, make_plan

        plan = make_plan(shapes, m, n, x.device)
        source = kernel_weight(layer, compute, even=plan.words is not None or plan.even)
        return FusedUpdates(*parts, plan, source)
    return UPDATES[backend](*parts)


def _thin_updates(
    adapted: "MokaLinear", compute: torch.dtype, autocast: bool, device: torch.device, fused: bool
) -> DenseUpdates:
    """The thin products of a layer, made again only where something about them has changed."""
    layer = adapted.base_layer
    cast = torch.get_autocast_dtype(device.type) if autocast else None
    key = (layer, compute, cast, device, fused, adapted.shapes, adapted.scaling, adapted.gating)
    made_for, updates = _THIN.get(adapted, (None, None))
    if updates is not None and made_for == key:
        return updates
    m, n, quantised = layer.out_features, layer.in_features, is_quantised(layer)
    weight, frozen = partial(dense_weight, layer, often=True), partial(frozen_output, layer, autocast)
    gradient = None if autocast or not is_four_bit(layer) else partial(input_gradient, layer)
    parts = (adapted.shapes, m, n, adapted.scaling, weight, quantised, adapted.gating, frozen, gradient)
    if fused:
        from moka_pl.ops.triton import FusedThinUpdates, make_thin_plan

        # Under autocast a 4-bit layer's product may have another dtype than the layer says.
        own = quantised and cast in (None, compute)
        updates = FusedThinUpdates(
            *parts,
            plan=make_thin_plan(adapted.shapes, m, n, device),
            source=partial(_thin_source, layer, compute) if own else None,
        )
    else:
        updates = ThinUpdates(*parts)
    _THIN[adapted] = key, updates
    return updates


def _thin_source(layer: nn.Linear, compute: torch.dtype) -> "WeightSource | None":
    """The frozen weight as the thin products' kernels dequantise it; None where it multiplies in 8 bits."""
    return None if multiplies_in_float8(layer, compute) else kernel_weight(layer, compute, even=True)


def _autocasts(x: Tensor) -> bool:
    """Whether autocast changes the dtype of x; float64 it leaves as it is."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def _must_run_itself(layer: nn.Linear, device: torch.device, quantised: bool) -> bool:
    """Whether passing the frozen layer by would leave something undone."""
    bias = layer.bias
    trained = not quantised and layer.weight.requires_grad
    trained = trained or (bias is not None and bias.requires_grad)
    return trained or hook_count(layer) > 0 or storage_device(layer, quantised) != device


def count_merged(model: nn.Module) -> int:
    """Returns how many adapted layers compute W + ΔW as one matrix on a GPU while they train."""
    from moka_pl.adapters.layer import MokaLinear

    layers = [module for module in model.modules() if isinstance(module, MokaLinear)]
    return sum(
        layer.backend in ("auto", "fused")
        and not layer.dropout.p
        and not is_thin(layer.shapes, layer.out_features, layer.in_features)
        for layer in layers
    )


def is_decoding(adapted: "MokaLinear", x: Tensor) -> bool:
    """Whether the kernels for decoding serve x, (..., n): on a GPU, without gradients, as in generating."""
    n = x.shape[-1]
    if torch.is_grad_enabled() or not 0 < x.numel() // n < DECODE_TOKENS:
        return False
    return asks_for_kernels(adapted, x) and can_fuse(
        x, adapted.moka_B.dtype, adapted.shapes, adapted.out_features
    )


def asks_for_kernels(adapted: "MokaLayer", x: Tensor) -> bool:
    """Whether an adapted layer's backend means the kernels for x, where they can run."""
    return adapted.backend == "fused" or (adapted.backend == "auto" and x.is_cuda)
