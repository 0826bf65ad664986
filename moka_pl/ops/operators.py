"""The merged forward as operators of PyTorch, for ``torch.compile``, which cannot look into kernels.

No compiler traces an autograd function that saves its input early, a Triton launch or a cache of what was
prepared for a layer. So while one traces, a layer calls ``moka_pl::product`` in the place of
:class:`moka_pl.ops.merged_forward.MergedForward`: the same computation as one operator, whose sizes and
gradients the compiler is told. The backend is chosen when the operator runs, so that one compiled graph
serves any number of tokens.

An operator takes tensors and plain values. To it a layer is a tensor, too, which holds the layer's number: a
plain number would be a constant to a compiler, which would then compile every layer of a model anew.
"""

from collections.abc import Sequence
from itertools import count
from math import prod
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from moka_pl.ops.dispatch import Backend, fixed_backend, updates_alone
from moka_pl.ops.layout import Shape
from moka_pl.ops.merged_forward import DenseUpdates
from moka_pl.ops.thin import ThinUpdates, count_hidden


class Layer(Protocol):
    """A layer that is merged with its update."""

    def decode(self, x: Tensor) -> Tensor | None:
        """Computes the layer for few tokens without gradients, (..., m); None where that is not cheaper."""

    def updates_for(self, x: Tensor) -> tuple[DenseUpdates, Tensor | None]:
        """Returns what computes the layer for x, of the product's dtype, and the bias in that dtype."""


_LAYERS: WeakValueDictionary[int, Layer] = WeakValueDictionary()
_NUMBERS = count()


def number_layer(layer: Layer) -> Tensor:
    """Gives a layer the number by which operators find it as long as it lives, as a tensor on the CPU."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    with torch.inference_mode(False):  # an inference tensor could not be kept for a backward pass
        return torch.tensor(number, device="cpu")


def operator_product(
    x: Tensor,
    gate: Tensor | None,
    left: Tensor,
    right: Tensor,
    layer: Tensor | None,
    shapes: tuple[Shape, ...],
    m: int,
    backend: Backend,
) -> Tensor:
    """Computes ``(W + ΔW) x + bias``, shape (..., m), by an operator; without a layer ``ΔW x``.

    Args:
        x: Input in the compute dtype, shape (..., n).
        gate: Gate logits, (r,), or None; without a layer the weights w.
        left: Packed left factors.
        right: Packed right factors.
        layer: The layer's number, or None.
        shapes: r shapes.
        m: Output features.
        backend: The requested backend.
    """
    device = x.device.type
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    hidden = count_hidden(shapes) if fixed_backend(backend, x, right.dtype, shapes, m) == "thin" else 0
    sizes = [int(size) for shape in shapes for size in shape]
    decodes = not torch.is_grad_enabled()
    out: Tensor = _product(x, gate, left, right, layer, sizes, m, backend, cast, hidden, decodes)[0]
    return out


@torch.library.custom_op("moka_pl::product", mutates_args=())
def _product(
    x: Tensor,
    gate: Tensor | None,
    left: Tensor,
    right: Tensor,
    layer: Tensor | None,
    sizes: Sequence[int],
    m: int,
    backend: str,
    cast: torch.dtype | None,
    hidden: int,
    decodes: bool,
) -> tuple[Tensor, Tensor]:
    """Computes the product, (..., m), and what its gradients need beside its inputs, (T, R) or empty.

    Args:
        x: Input, shape (..., n).
        gate: Gate logits or weights, (r,), or None.
        left: Packed left factors.
        right: Packed right factors.
        layer: The layer's number, or None.
        sizes: The shapes' fields, one after another.
        m: Output features.
        backend: The requested backend, for an update alone.
        cast: Dtype of autocast; None without it.
        hidden: R of the thin backend; else 0.
        decodes: Whether the layer's computation for few tokens may serve.
    """
    nothing = x.new_empty(_kept_shape(x, hidden))
    with torch.autocast(x.device.type, cast, enabled=cast is not None):
        out = _LAYERS[int(layer)].decode(x) if decodes and layer is not None else None
        if out is not None:
            return out, nothing  # (..., m)
        updates, bias = _updates(x, gate, left, right, layer, sizes, m, backend)
    kept: list[Tensor] = []
    with torch.autocast(x.device.type, cast, enabled=False):
        out = updates.product(x.reshape(-1, x.shape[-1]), bias, left, right, gate, lambda *t: kept.extend(t))
    # A compiler is told the size of what thin products keep, which do not where they are merged with many
    # tokens; what others keep on a CPU is computed again.
    return out.view(*x.shape[:-1], m), kept[0] if hidden and kept else nothing


@_product.register_fake
def _(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, m, _, _, hidden, _ = rest
    return x.new_empty(*x.shape[:-1], m), x.new_empty(_kept_shape(x, hidden))


@torch.library.custom_op("moka_pl::product_backward", mutates_args=())
def _product_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor | None,
    left: Tensor,
    right: Tensor,
    kept: Tensor,
    layer: Tensor | None,
    sizes: Sequence[int],
    backend: str,
    cast: torch.dtype | None,
    needs_x: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Computes the gradients of ``x``, ``gate``, ``left`` and ``right``; an empty one where there is none."""
    m, n = grad.shape[-1], x.shape[-1]
    with torch.autocast(x.device.type, cast, enabled=cast is not None):
        updates, _ = _updates(x, gate, left, right, layer, sizes, m, backend)
    parts = grad.reshape(-1, m).contiguous(), x.reshape(-1, n), left, right, gate
    with torch.autocast(x.device.type, cast, enabled=False):
        merged = isinstance(updates, ThinUpdates) and updates.merges(len(parts[1]))
        kept_parts = (kept,) if kept.shape[1] and not merged else ()
        grad_x, grad_left, grad_right, grad_gate = updates.backward(*parts, kept_parts, needs_x)
    return (
        x.new_empty(0) if grad_x is None else grad_x.contiguous().view(x.shape),
        right.new_empty(0) if gate is None or grad_gate is None else grad_gate.to(gate.dtype),
        grad_left.to(left.dtype).contiguous(),
        grad_right.to(right.dtype).contiguous(),
    )


@_product_backward.register_fake
def _(
    grad: Tensor, x: Tensor, gate: Tensor | None, left: Tensor, right: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *_, needs_x = rest
    grad_gate = right.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    grad_x = x.new_empty(x.shape if needs_x else 0)
    return grad_x, grad_gate, left.new_empty(left.shape), right.new_empty(right.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Saves what the gradients are computed from."""
    x, gate, left, right, layer, sizes, _, backend, cast, *_ = inputs
    ctx.save_for_backward(x, gate, left, right, output[1], layer)
    ctx.rest = sizes, backend, cast
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad: Tensor | None, grad_kept: Tensor | None) -> tuple[Tensor | None, ...]:
    """Gradients of x, gate logits and packed factors."""
    nothing = (None,) * 7
    if grad is None:
        return None, None, None, None, *nothing
    gate = ctx.saved_tensors[1]
    needs_x = ctx.needs_input_grad[0]
    grad_x, grad_gate, *grads = _product_backward(grad, *ctx.saved_tensors, *ctx.rest, needs_x)
    return grad_x if needs_x else None, None if gate is None else grad_gate, *grads, *nothing


_product.register_autograd(_gradients, setup_context=_save)


def _updates(
    x: Tensor,
    gate: Tensor | None,
    left: Tensor,
    right: Tensor,
    layer: Tensor | None,
    sizes: Sequence[int],
    m: int,
    backend: Any,
) -> tuple[DenseUpdates, Tensor | None]:
    """What computes the product, and the bias of a layer."""
    if layer is not None:
        return _LAYERS[int(layer)].updates_for(x)
    fields = [sizes[i : i + 5] for i in range(0, len(sizes), 5)]
    shapes = tuple(Shape(m_a, n_a, m_b, n_b, bool(one)) for m_a, n_a, m_b, n_b, one in fields)
    assert gate is not None
    return updates_alone(x, gate, left, right, shapes, m, backend), None


def _kept_shape(x: Tensor, hidden: int) -> tuple[int, int]:
    """Shape of the hidden numbers, (T, R), or (0, 0)."""
    return (prod(x.shape[:-1]), hidden) if hidden else (0, 0)
