"""A frozen layer and its update as one operation: ``y = (W + ΔW) x + bias``.

Beside the frozen layer the update costs one matrix product forward and two backward. Merged with it, it costs
building ``W + ΔW`` instead of W (which a 4-bit layer builds anyway) and the one product that gives the
gradient of ΔW: ``∂L/∂ΔW = Gᵀ X``, which is then projected to factors and gates.

For few tokens products with the small factors are cheaper than building ΔW. Merged with the frozen layer,
they share its transposed input and add to its result in place.

Neither sum nor ΔW is kept on a GPU. On a CPU, where building takes longer, the sum is kept for the backward
pass where it is no larger than the layer's input and output, or very small.

Without W the same code computes the update alone (see :func:`moka_pl.ops.kronecker.kronecker_linear`).
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moka_pl._compat import change_count, saving_hooks
from moka_pl.ops.dense import add_delta_, project
from moka_pl.ops.gating import Gating, gates_of, logits_gradient
from moka_pl.ops.layout import Shape
from moka_pl.ops.shared_input import Held, add_product_, new_link
from moka_pl.ops.structured import Sides, gather, structured_products, to_rows

#: Tokens above which bitsandbytes dequantises a 4-bit weight for its product, too; for fewer it has a kernel.
DEQUANTISED_TOKENS = 1536

#: Entries up to which ``W + ΔW`` is kept on a CPU however few the tokens are: half a megabyte.
_SMALL = 2**17

#: Takes what is to be saved for the backward pass.
Keep = Callable[..., None]


@dataclass(frozen=True, eq=False)
class DenseUpdates:
    """Computes the merged forward and its gradients by building ``W + ΔW`` with PyTorch's own operations.

    Args:
        shapes: r shapes.
        m: Output features.
        n: Input features.
        scaling: s.
        base_weight: Returns W, shape (m, n), of full precision; None for ΔW alone.
        fresh: Whether ``base_weight`` makes a new tensor at every call, as dequantising does; ΔW is then
            added in place.
        gating: How ``gate`` makes α; with ``none`` it holds α itself, and without a gate α_i = 1/r.
    """

    shapes: tuple[Shape, ...]
    m: int
    n: int
    scaling: float
    base_weight: Callable[[], Tensor] | None
    fresh: bool
    gating: Gating

    def product(
        self, x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, gate: Tensor | None, keep: Keep
    ) -> Tensor:
        """Computes ``(W + ΔW) x + bias``, shape (T, m).

        Args:
            x: Input, shape (T, n).
            bias: Bias of the frozen layer, (m,), or None.
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.
            keep: Called once, with tensors that :meth:`backward` would compute again, as early as these are
                there: when checkpointing computes a block again, nothing after its last call is needed.
        """
        small = self.m * self.n <= max(_SMALL, len(x) * (self.m + self.n))
        if not (small and self._keeps(x)):
            keep()
            return F.linear(x, self.weight(left, right, gate, x.dtype), bias)
        total = self.weight(left, right, gate, x.dtype)  # (m, n)
        keep(total)
        return F.linear(x, total, bias)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        gate: Tensor | None,
        kept: tuple[Tensor, ...],
        needs_x: bool,
        total: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """Computes the gradients of ``x`` (None unless needed), ``left``, ``right`` and ``gate``.

        Args:
            grad: Gradient of :meth:`product`, shape (T, m).
            x: Input, shape (T, n).
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.
            kept: What :meth:`product` has kept, or nothing.
            needs_x: Whether the gradient of ``x`` is needed.
            total: What is added to that, shape (T, n), and may be changed in place; None for nothing.
        """
        grad_x = None
        if needs_x:
            weight = kept[0] if kept else self.weight(left, right, gate, x.dtype)  # (m, n)
            grad_x = add_product_(total, grad, weight)  # (T, n)
        return grad_x, *self.factor_gradients(grad, x, left, right, gate)

    def weight(self, left: Tensor, right: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Builds ``W + ΔW``, shape (m, n).

        Args:
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.
            dtype: Dtype of the result.
        """
        if self.base_weight is None:
            total = right.new_zeros(self.m, self.n)
        else:
            total = self.base_weight().to(dtype, copy=not self.fresh)
        return add_delta_(total, left, right, self._alpha(gate, right) * self.scaling, self.shapes).to(dtype)

    def factor_gradients(
        self, grad: Tensor, x: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Computes the gradients of ``left``, ``right`` and ``gate``.

        Args:
            grad: Gradient of :meth:`product`, shape (T, m).
            x: Input, shape (T, n).
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.
        """
        return self.project(grad.mT @ x, left, right, gate)

    def project(
        self, grad: Tensor, left: Tensor, right: Tensor, gate: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Projects ∂L/∂ΔW to the gradients of ``left``, ``right`` and ``gate``.

        Args:
            grad: ∂L/∂ΔW, shape (m, n).
            left: Packed left factors.
            right: Packed right factors.
            gate: Gate logits, (r,), or None.
        """
        alpha = self._alpha(gate, right)  # (r,)
        grad_left, grad_right, grad_weights = project(grad, left, right, alpha * self.scaling, self.shapes)
        return grad_left, grad_right, self._gate_gradient(gate, alpha, grad_weights)

    def _keeps(self, x: Tensor) -> bool:
        """Whether the product is to keep what is small beside its input and output: on a CPU, with W."""
        return self.base_weight is not None and x.device.type == "cpu"

    def _alpha(self, gate: Tensor | None, right: Tensor) -> Tensor:
        """α, (r,)."""
        r = len(self.shapes)
        return right.new_full((r,), 1 / r) if gate is None else gates_of(gate, self.gating)

    def _gate_gradient(self, gate: Tensor | None, alpha: Tensor, grad_weights: Tensor) -> Tensor | None:
        """The gradient of ``gate``, (r,), for that of the weights s α."""
        if gate is None:
            return None
        return logits_gradient(alpha, grad_weights * self.scaling, self.gating)


class StructuredUpdates(DenseUpdates):
    """The same without building ΔW, by products with the small factors.

    They run in the wider dtype of input and factors and are rounded once: in half precision every
    intermediate would add an error of its own, several times that of one matrix product.
    """

    def product(
        self, x: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, gate: Tensor | None, keep: Keep
    ) -> Tensor:
        """As :meth:`DenseUpdates.product`."""
        wide = torch.promote_types(x.dtype, right.dtype)
        factors = self._gather(left, right, self._alpha(gate, right), wide)
        keep(*(factors if self._keeps(x) else ()))
        products = structured_products.of(self.shapes, self.m, self.n, len(x), like=factors.right)
        if self.base_weight is None:
            products.out.zero_()
        else:
            # The frozen layer's own product: W xᵀ rounds otherwise on some CPUs, and step 0 would differ.
            products.out.copy_(F.linear(x, self.base_weight().to(x.dtype), bias).mT)  # (m, T)
        products.x.copy_(x.mT)  # (n, T)
        products.add_update_(factors)
        return to_rows(products.out, x.dtype)  # (T, m)

    def backward(
        self,
        grad: Tensor,
        x: Tensor,
        left: Tensor,
        right: Tensor,
        gate: Tensor | None,
        kept: tuple[Tensor, ...],
        needs_x: bool,
        total: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        """As :meth:`DenseUpdates.backward`."""
        dtype, wide = x.dtype, torch.promote_types(x.dtype, right.dtype)
        alpha = self._alpha(gate, right)  # (r,)
        factors = Sides(*kept) if kept else self._gather(left, right, alpha, wide)
        products = structured_products.of(self.shapes, self.m, self.n, len(x), like=factors.right)
        products.out.copy_(grad.mT)  # (m, T)
        products.x.copy_(x.mT)  # (n, T)
        if needs_x and self.base_weight is None:
            products.to_x.zero_()  # (n, T)
        elif needs_x and self.base_weight is not None:
            torch.mm(self.base_weight().to(wide).mT, products.out, out=products.to_x)  # (n, T)
        parts = right.to(wide), (alpha * self.scaling).to(wide), factors
        grad_left, grad_right, grad_weights = products.backward(*parts, needs_x)
        grad_x = None
        if needs_x:
            grad_x = to_rows(products.to_x, dtype)  # (T, n)
            grad_x = grad_x if total is None else grad_x.add_(total)
        return grad_x, grad_left, grad_right, self._gate_gradient(gate, alpha, grad_weights)

    def _gather(self, left: Tensor, right: Tensor, alpha: Tensor, wide: torch.dtype) -> Sides:
        """The gathered factors in the dtype of the products."""
        return gather(left.to(wide), right.to(wide), (alpha * self.scaling).to(wide), self.shapes)


def _save(ctx: Any, parameters: tuple[Tensor | None, ...], activations: tuple[Tensor, ...]) -> None:
    """Saves what the backward pass needs: activations now, not when the forward pass has ended.

    Where hooks pack what is saved, as checkpointing's do, they are called at once, and for activations only:
    parameters stay where they are, and each would take these hooks tens of microseconds.
    """
    hooks = saving_hooks()
    ctx.unpack = None
    if hooks is None:
        ctx.save_for_backward(*parameters, *activations)
        return
    pack, ctx.unpack = hooks
    ctx.packed = [pack(tensor) for tensor in activations]
    ctx.parameters = parameters
    ctx.versions = _versions(parameters)


def _saved(ctx: Any) -> tuple[Any, ...]:
    """What :func:`_save` has saved, parameters first."""
    if ctx.unpack is None:
        return ctx.saved_tensors  # type: ignore[no-any-return]
    if _versions(ctx.parameters) != ctx.versions:
        raise RuntimeError("a MoKA layer's factors or gates were changed in place before the backward pass")
    return *ctx.parameters, *map(ctx.unpack, ctx.packed)


def _versions(tensors: tuple[Tensor | None, ...]) -> list[int]:
    """How often each tensor has been changed in place."""
    return [-1 if tensor is None or tensor.is_inference() else change_count(tensor) for tensor in tensors]


class MergedForward(torch.autograd.Function):
    """``y = (W + s Σ_i α_i (A_i ⊗ B_i)) x + bias``; saves x, gate logits, factors, what ``updates`` keeps."""

    @staticmethod
    def forward(
        ctx: Any,
        source: Tensor,
        gate: Tensor | None,
        left: Tensor,
        right: Tensor,
        bias: Tensor | None,
        updates: DenseUpdates,
        saves: bool,
        held: Held | None = None,
    ) -> Any:
        """Maps x of shape (..., n) to (T, m), and to a link where x is held.

        A view made here could not be changed in place by a model.

        Args:
            ctx: Autograd's context.
            source: Input in the compute dtype, or what stands for it.
            gate: Gate logits, (r,), or None.
            left: Packed left factors.
            right: Packed right factors.
            bias: Bias of the frozen layer, (m,), or None.
            updates: Computes the product and its gradients.
            saves: Whether gradients are enabled, which a function itself cannot see.
            held: The input of a layer that shares it.
        """
        ctx.updates = updates
        x = source if held is None else held.x
        # Every product has the dtype it should have; autocast would build ΔW in half precision.
        tokens = x.reshape(-1, updates.n)  # (T, n)
        device = x.device.type

        def keep(*kept: Tensor) -> None:
            if saves:
                _save(ctx, (gate, left, right), (x, *kept))

        with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
            out = updates.product(tokens, bias, left, right, gate, keep)  # (T, m)
        if held is None:
            return out
        ctx.set_materialize_grads(False)
        return out, new_link(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Gradients of x, gate logits and packed factors."""
        nothing = (None,) * 4
        if grad is None:
            return total, None, None, None, *nothing
        gate, left, right, x, *kept = _saved(ctx)
        updates: DenseUpdates = ctx.updates
        parts = grad.contiguous(), x.reshape(-1, updates.n)  # (T, m), (T, n)
        flat = None if total is None else total.contiguous().view(-1, updates.n)  # (T, n)
        grad_x, grad_left, grad_right, grad_gate = updates.backward(
            *parts, left, right, gate, tuple(kept), ctx.needs_input_grad[0], flat
        )
        grad_x = None if grad_x is None else grad_x.view(x.shape)
        return grad_x, grad_gate, grad_left, grad_right, *nothing
