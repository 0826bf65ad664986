"""Linear layers whose weight is in a library's format, and dequantised whenever W is needed."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moka_pl.backbone.quantization.kinds import Quantization
from moka_pl.errors import BackboneError
from moka_pl.ops.shared_input import Held, add_product_, call_sharing, new_link

#: The ``quantization_config`` of a checkpoint's ``config.json``.
QuantConfig = Mapping[str, Any]


class StoredWeight(ABC):
    """How a quantised W, (m, n), is stored: by a :class:`MadeWeight`, a :class:`ReadWeight`, or what is both.

    Args:
        shape: (m, n).
        dtype: Dtype of the dequantised W, which is that of the weight that it was made of.
        scales: Tensors beside the codes, by name. No module casts them; they follow the codes to a device.
    """

    kind: ClassVar[Quantization]

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, scales: dict[str, Tensor]) -> None:
        self.shape, self.dtype, self.scales = torch.Size(shape), dtype, scales

    @abstractmethod
    def dequantise(self, codes: Tensor) -> Tensor:
        """Returns W, (m, n), in its dtype: the numbers of the format's own library."""

    def read(self, codes: Tensor) -> Tensor:
        """As :meth:`dequantise`, wherever the codes have been moved to."""
        if any(scale.device != codes.device for scale in self.scales.values()):
            self.scales = {name: scale.to(codes.device) for name, scale in self.scales.items()}
        return self.dequantise(codes)

    @property
    def label(self) -> str:
        """What tells weights apart that are stored otherwise; without colons."""
        return self.kind


class MadeWeight(StoredWeight):
    """A format in which weights are quantised here."""

    @classmethod
    def import_package(cls) -> None:
        """Imports what making and reading W needs; an ``ImportError`` says what is missing."""

    @classmethod
    def unsupported_reason(cls, m: int, n: int) -> str | None:
        """Returns why a W of (m, n) cannot be stored, or None."""
        return None

    @classmethod
    @abstractmethod
    def quantise(cls, weight: Tensor) -> tuple[Tensor, Self]:
        """Returns the codes of W, (m, n), integers of any shape, and all else that it takes to read them."""


class LayerTensors(NamedTuple):
    """What a checkpoint holds of a quantised layer.

    Attributes:
        tensors: Its tensors by name, ``parts`` and perhaps ``optional_parts`` of the format.
        shape: (m, n).
        dtype: Dtype of the dequantised W.
        config: The checkpoint's ``quantization_config``.
    """

    tensors: Mapping[str, Tensor]
    shape: tuple[int, int]
    dtype: torch.dtype
    config: QuantConfig

    def check(self, sizes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuses tensors that are not those of the layer.

        Raises:
            BackboneError: Naming the first that has another size than ``sizes`` says.
        """
        for name, size in sizes.items():
            if (found := tuple(self.tensors[name].shape)) != size:
                raise BackboneError(f"{name} is {found}, not {size}; copy the model again")


class ReadWeight(StoredWeight):
    """A format whose checkpoints are read as they are."""

    #: How a layer's tensors are called in checkpoints, and those that may lack.
    parts: ClassVar[tuple[str, ...]]
    optional_parts: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def unreadable_reason(cls, config: QuantConfig) -> str | None:
        """Returns why a checkpoint with this ``quantization_config`` cannot be read, or None."""
        return None

    @classmethod
    @abstractmethod
    def read_layer(cls, layer: LayerTensors) -> tuple[Tensor, Self]:
        """Returns the codes of W, (m, n), integers of any shape, and all else that it takes to read them.

        Raises:
            BackboneError: If the sizes of the tensors are not those of the layer.
        """


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

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles what reads the codes, too, of which a parameter's own copy knows nothing."""
        return StoredParameter, (self.data, self.stored)


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
        return call_sharing(FrozenProduct, x.to(compute), bias, self.dequantise).to(x.dtype)  # (..., m)


class FrozenProduct(torch.autograd.Function):
    """``W x + bias`` with a frozen W, which is made again for the gradient of x, and not kept for it."""

    @staticmethod
    def forward(
        ctx: Any, source: Tensor, bias: Tensor | None, weight: Callable[[], Tensor], held: Held | None = None
    ) -> Any:
        """Maps x to (..., m), and to a link where x is held.

        Args:
            ctx: What the backward pass is told.
            source: The input, (..., n), or what stands for it.
            bias: The bias, (m,), or None.
            weight: Makes W, (m, n), each time that it is called.
            held: The input of a layer that shares it.
        """
        ctx.weight = weight
        x = source if held is None else held.x
        out = F.linear(x, weight().to(x.dtype), bias)
        if held is None:
            return out
        ctx.set_materialize_grads(False)
        return out, new_link(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, total: Tensor | None = None) -> tuple[Tensor | None, ...]:
        """Returns the gradients of x, (..., n), and of the bias, (m,)."""
        needs_x, needs_bias, *_ = ctx.needs_input_grad
        if grad is None:
            return total, None, None, None
        grad_x = None
        if needs_x and total is None:
            grad_x = grad @ ctx.weight().to(grad.dtype)  # (..., n)
        elif needs_x and total is not None:
            flat = total.contiguous().view(-1, total.shape[-1])  # (T, n)
            grad_x = add_product_(flat, grad.flatten(0, -2), ctx.weight().to(grad.dtype)).view(total.shape)
        return grad_x, grad.flatten(0, -2).sum(0) if needs_bias else None, None, None
