"""Chooses how an adapted layer is computed: frozen layer and update apart, merged, or by decoding kernels."""

from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from moka_pl._compat import hook_count
from moka_pl.backbone.quantization import (
    dense_weight,
    frozen_output,
    is_quantised,
    kernel_weight,
    layer_compute_dtype,
    storage_device,
)
from moka_pl.ops.dispatch import DECODE_TOKENS, can_fuse, can_fuse_thin, resolve_backend
from moka_pl.ops.kronecker import UPDATES
from moka_pl.ops.merged_forward import DenseUpdates
from moka_pl.ops.thin import ThinUpdates

if TYPE_CHECKING:
    from moka_pl.adapters.layer import MokaLinear


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


def plan_forward(adapted: "MokaLinear", x: Tensor) -> ForwardPlan | None:
    """Plans to compute an adapted layer as ``(W + ΔW) x``; None where W and ΔW are to stay apart.

    They do where somebody listens to the frozen layer, trains it or keeps its weight elsewhere, or where
    W + ΔW would be rounded to half precision without the kernels' care for small updates.
    """
    layer, dtype, shapes = adapted.base_layer, adapted.moka_B.dtype, adapted.shapes
    if _must_run_itself(layer, x.device):
        return None
    compute: torch.dtype
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64  # which it leaves as it is
    if is_quantised(layer):
        compute, result = layer_compute_dtype(layer, x), x.dtype
    elif type(layer) is nn.Linear:
        compute = result = torch.get_autocast_dtype(device) if autocast else x.dtype
        if compute != layer.weight.dtype and not autocast:
            return None
    else:
        return None
    m, n = layer.out_features, layer.in_features
    resolved = resolve_backend(adapted.backend, x, dtype, shapes, m)
    if resolved == "thin":
        fused = can_fuse_thin(x, compute, dtype, shapes, m)
        return ForwardPlan(_thin_updates(adapted, compute, autocast, x.device, fused), compute, result)
    weight = partial(dense_weight, layer, often=True)
    parts = (shapes, m, n, adapted.scaling, weight, is_quantised(layer), adapted.gating)
    if resolved == "fused" and compute in (torch.bfloat16, torch.float32):
        from moka_pl.ops.triton import FusedUpdates, make_plan

        plan = make_plan(shapes, m, n, x.device)
        source = kernel_weight(layer, compute, even=plan.side > 0 or plan.even)
        return ForwardPlan(FusedUpdates(*parts, plan, source), compute, result)
    if resolved != "fused" and compute == dtype and compute.itemsize >= 4:
        return ForwardPlan(UPDATES[resolved](*parts), compute, result)
    return None


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
    parts = (adapted.shapes, m, n, adapted.scaling, weight, quantised, adapted.gating, frozen)
    if fused:
        from moka_pl.ops.triton import FusedThinUpdates, make_thin_plan

        # Under autocast a 4-bit layer's product may have another dtype than the layer says.
        own = quantised and cast in (None, compute)
        updates = FusedThinUpdates(
            *parts,
            plan=make_thin_plan(adapted.shapes, m, n, device),
            source=partial(kernel_weight, layer, compute, even=True) if own else None,
        )
    else:
        updates = ThinUpdates(*parts)
    _THIN[adapted] = key, updates
    return updates


def _must_run_itself(layer: nn.Linear, device: torch.device) -> bool:
    """Whether passing the frozen layer by would leave something undone."""
    bias = layer.bias
    trained = not is_quantised(layer) and layer.weight.requires_grad
    trained = trained or (bias is not None and bias.requires_grad)
    return trained or hook_count(layer) > 0 or storage_device(layer) != device


def is_decoding(adapted: "MokaLinear", x: Tensor) -> bool:
    """Whether the kernels for decoding serve x, (..., n): on a GPU, without gradients, as in generating."""
    n = x.shape[-1]
    if torch.is_grad_enabled() or not 0 < x.numel() // n < DECODE_TOKENS:
        return False
    asked = adapted.backend == "fused" or (adapted.backend == "auto" and x.is_cuda)
    return asked and can_fuse(x, adapted.moka_B.dtype, adapted.shapes, adapted.out_features)
