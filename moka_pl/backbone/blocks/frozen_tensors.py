"""Where the bytes of a block's frozen weights are, so that they can be taken out and put back."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from moka_pl.backbone.quantization import forget_scales, is_four_bit, weight_scales


class FrozenTensor(NamedTuple):
    """A frozen matrix, or the scales of a quantised one, in its place in a model.

    Attributes:
        layer: The module that it belongs to.
        name: Name of the module's parameter.
        scales: Which of the parameter's scales these are; None for the parameter itself.
    """

    layer: nn.Module
    name: str
    scales: str | None = None

    @property
    def tensor(self) -> Tensor:
        """What is in the place now."""
        tensor: Tensor
        tensor = getattr(self.layer, self.name).data if self.scales is None else self._scales[self.scales]
        return tensor

    @property
    def _scales(self) -> dict[str, Any]:
        layer: Any = self.layer
        found: dict[str, Any]
        found = vars(layer.weight.quant_state) if is_four_bit(layer) else layer.stored.scales
        return found

    def put(self, tensor: Tensor) -> None:
        """Puts a tensor into the place."""
        if self.scales is None:
            getattr(self.layer, self.name).data = tensor
        else:
            self._scales[self.scales] = tensor

    def withdraw(self, like: Tensor) -> None:
        """Leaves nothing in the place: an error for whoever computes with it, or NaN.

        Args:
            like: What was there, or what has its shape.
        """
        if self.scales is not None:
            forget_scales(self.layer)
            self._scales[self.scales] = None  # codes without scales would be computed with, without an error
        elif like.dtype.is_floating_point:
            self.put(like.new_full((1,), torch.nan).expand(like.shape))
        else:
            self.empty(like)

    def empty(self, like: Tensor) -> None:
        """Leaves a tensor without entries in the place, which may be moved to another device."""
        self.put(like.new_empty(0, *like.shape[1:]))


def frozen_tensors(block: nn.Module) -> Iterator[FrozenTensor]:
    """Yields the frozen matrices of a block, each once, and the scales of the quantised ones.

    Vectors, such as norms and biases, and the small rest of a 4-bit weight's state are left out.
    """
    seen: set[int] = set()
    for module in block.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad or parameter.ndim < 2 or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            yield FrozenTensor(module, name)
            if name == "weight":
                for scales in weight_scales(module):
                    yield FrozenTensor(module, name, scales)


def decoder_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks of a model by name, in order: what is in its outermost lists of modules."""
    blocks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{block}.") for block in blocks)
        if isinstance(module, nn.ModuleList) and not inside:
            blocks |= {f"{name}.{key}": child for key, child in module.named_children()}
    return blocks


def block_ends(model: nn.Module) -> dict[str, nn.Module]:
    """Returns the blocks of a model by the names of their last modules."""
    names = [name for name, _ in model.named_modules()]
    return {
        [name for name in names if name == block or name.startswith(f"{block}.")][-1]: module
        for block, module in decoder_blocks(model).items()
    }


class BlockStore(Protocol):
    """Keeps the frozen tensors of blocks, embedding and head elsewhere, or a part of them."""

    @property
    def share(self) -> float:
        """The share of the blocks that stays on their device."""

    def add(self, block: nn.Module) -> None:
        """Takes the next block, whose weights are all there, and leaves it without."""

    def add_ends(self, model: nn.Module) -> None:
        """Takes embedding and output head of the model, which is there as a whole but for its blocks."""
