"""bitsandbytes' 4-bit layers: which they are, and that they compute with the weights they hold."""

import logging
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING

from torch import nn

from moka_pl.errors import BackboneError
from moka_pl.utils import quiet

if TYPE_CHECKING:
    from typing import TypeGuard

    from bitsandbytes.nn import Linear4bit


def import_bitsandbytes() -> None:
    """Imports bitsandbytes, ahead of the libraries that would.

    On some CPUs it asks for a package that would fetch a kernel for evaluations from the hub.
    """
    with quiet("bitsandbytes.backends.cpu.ops", below=logging.ERROR):
        import_module("bitsandbytes")


def is_4bit(layer: nn.Module) -> "TypeGuard[Linear4bit]":
    """Whether the layer is a bitsandbytes 4-bit layer (without importing bitsandbytes for others)."""
    return any(kind.__name__ == "Linear4bit" for kind in type(layer).__mro__)


def keep_weights(model: nn.Module) -> None:
    """Keeps all 4-bit layers of a model from changing their weights between training and evaluation.

    On CPUs with bfloat16 instructions bitsandbytes stores a layer anew at its first evaluation, with scales
    rounded to bfloat16: the same layer then computes something else than in training, and what was trained
    beside it fits a little less. Such storage is switched off.

    Args:
        model: A model, or a single layer.

    Raises:
        BackboneError: Where bitsandbytes reads the rows of a layer wrongly on this CPU.
    """
    for name, layer in model.named_modules():
        if not is_4bit(layer):
            continue
        layer.support_avx512bf16_for_cpu = False
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            layer.state_dict()  # undoes that storage
        if state is None or layer.weight.device.type != "cpu" or layer.in_features % state.blocksize == 0:
            continue
        if not _reads_rows(layer.in_features, state.blocksize, state.quant_type):
            raise BackboneError(
                f"{name or 'the layer'}: bitsandbytes misreads 4-bit rows of {layer.in_features} entries on "
                f"this CPU (no multiple of its block of {state.blocksize}); use quantization: none, or a GPU"
            )


@cache
def _reads_rows(entries: int, blocksize: int, quant_type: str) -> bool:
    """Whether rows of this size are dequantised as the same numbers in a single long row."""
    import torch
    from bitsandbytes import functional

    rows = torch.randn(blocksize, entries, generator=torch.Generator().manual_seed(0))
    data, state = functional.quantize_4bit(rows, blocksize=blocksize, quant_type=quant_type)
    found = functional.dequantize_4bit(data, state)
    state.shape = torch.Size([1, rows.numel()])
    return torch.equal(found, functional.dequantize_4bit(data, state).view_as(rows))
