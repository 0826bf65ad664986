"""Linear layers whose weight is in a library's format, and dequantised whenever W is needed."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moka_pl.backbone.quantization.kinds import Quantization


class StoredWeight:
    """How a quantised W, (m, n), is stored: the one thing to write for another format.

    Args:
        shape: (m, n).
        dtype: Dtype of the dequantised W, which is that of the weight that it was made of.
        scales: Tensors beside the codes, by name. No module casts them; they follow the codes to a device.
    """

    kind: ClassVar[Quantization]

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, scales: dict[str, Tensor]) -> None:
        self.shape, self.dtype, self.scales = torch.Size(shape), dtype, scales

    @classmethod
    def import_package(cls) -> None:
        """Imports what making and reading W needs; an ``ImportError`` says what is missing."""

    @classmethod
    def unsupported_reason(cls, m: int, n: int) -> str | None:
        """Returns why a W of (m, n) cannot be stored, or None."""
        return None

    @classmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Self]:
        """Returns the codes of W, (m, n), integers of any shape, and all else that it takes to read them."""
        raise NotImplementedError(f"{cls.kind} is only read, not made")

    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n), in its dtype: the numbers of the format's own library."""
        raise NotImplementedError

    def read(self, codes: Tensor) -> Tensor:
        """As :meth:`dequantise`, wherever the codes have been moved to."""
        if any(scale.device != codes.device for scale in self.scales.values()):
            self.scales = {name: scale.to(codes.device) for name, scale in self.scales.items()}
        return self.dequantise(codes)

    @property
    def label(self) -> str:
        """What tells weights apart that are stored otherwise; without colons."""
        return self.kind


class StoredParameter(nn.Parameter):
    """The codes of a quantised weight in one column, so that nobody takes them for W, and what reads them."""

    stored: StoredWeight

    def __new__(cls, codes: Tensor, stored: StoredWeight) -> Self:
        """Wraps codes, which are not trained."""
        new = super().__new__(cls, codes, requires_grad=False)
        new.stored = stored
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> "StoredParameter":
        """Copies what reads the codes, too, which a parameter's own copy leaves out."""
        if id(self) not in memo:
            memo[id(self)] = StoredParameter(self.data.clone(), copy.deepcopy(self.stored, memo))
        return memo[id(self)]  # type: ignore[no-any-return]


class QuantisedLinear(nn.Linear):
    """``y = W x + bias`` with a frozen W that is dequantised for each product, and not kept for the gradient.

    Like bitsandbytes' 4-bit layers it takes inputs of any dtype, computes in its own, and returns the
    input's.

    Args:
        codes: The codes of W.
        stored: What reads them.
        bias: The bias, (m,), or None.
        compute_dtype: Dtype of the product.
    """

    def __init__(
        self, codes: Tensor, stored: StoredWeight, bias: nn.Parameter | None, compute_dtype: torch.dtype
    ) -> None:
        nn.Module.__init__(self)
        self.out_features, self.in_features = stored.shape
        self.stored = stored
        self.weight = StoredParameter(codes.reshape(-1, 1), stored)
        self.bias = bias  # type: ignore[assignment]
        self.compute_dtype = compute_dtype

    def dequantise(self) -> Tensor:
        """Returns W, (m, n)."""
        return self.stored.read(self.weight.data)

    def forward(self, x: Tensor) -> Tensor:
        """Maps x of shape (..., n) to (..., m), both of any dtype."""
        compute, device = self.compute_dtype, x.device.type
        if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
            compute = torch.get_autocast_dtype(device)
        bias = None if self.bias is None else self.bias.to(compute)
        out: Tensor = _Product.apply(x.to(compute), bias, self.dequantise)  # type: ignore[no-untyped-call]
        return out.to(x.dtype)  # (..., m)


class _Product(torch.autograd.Function):
    """``W x + bias``; keeps nothing of W's size for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, weight: Callable[[], Tensor]) -> Tensor:
        """Maps x, (..., n), to (..., m)."""
        ctx.weight = weight
        return F.linear(x, weight().to(x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Returns the gradients of x, (..., n), and of the bias, (m,)."""
        needs_x, needs_bias, _ = ctx.needs_input_grad
        grad_x = grad @ ctx.weight().to(grad.dtype) if needs_x else None  # (..., n)
        return grad_x, grad.flatten(0, -2).sum(0) if needs_bias else None, None
