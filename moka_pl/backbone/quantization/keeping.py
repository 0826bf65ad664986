"""That bitsandbytes' 4-bit layers compute with the same W everywhere: in training, evaluation and merging."""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.backbone.quantization.four_bit import has_uneven_rows, is_four_bit
from moka_pl.backbone.quantization.layers import dense_weight, layer_compute_dtype
from moka_pl.backbone.quantization.stored import FrozenProduct
from moka_pl.errors import BackboneError
from moka_pl.lm.replaced_forward import forward_maker, replace_forward
from moka_pl.ops.shared_input import call_sharing


def keep_weights(model: nn.Module) -> None:
    """Keeps the 4-bit layers of a model, or a single one, at the W that was quantised.

    On CPUs with bfloat16 instructions bitsandbytes stores a layer anew at its first evaluation, with scales
    rounded to bfloat16: the same layer then computes something else than in training, and what was trained
    beside it fits a little less. Such storage is switched off. Layers whose rows bitsandbytes misreads on
    this CPU get a forward method that reads them right.

    Raises:
        BackboneError: Where a weight is a tensor of torchao's own, of which only torchao's operations can
            make anything.
    """
    for name, layer in model.named_modules():
        if type(getattr(layer, "weight", None)).__module__.startswith("torchao."):
            raise BackboneError(
                f"{name or 'the layer'}: {type(layer.weight).__name__} of torchao cannot be adapted; load "
                "the model unquantised, or by moka_pl with quantization int4 or float8"
            )
        if not is_four_bit(layer):
            continue
        layer.support_avx512bf16_for_cpu = False
        state = layer.weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            layer.state_dict()  # undoes that storage
        if state is None or layer.weight.device.type != "cpu" or not has_uneven_rows(state):
            continue
        read = _reads_rows(state.shape[-1], state.blocksize, state.quant_type)
        if not read and forward_maker(layer) is not _reading_right:
            replace_forward(layer, _reading_right)


@cache
def _reads_rows(entries: int, blocksize: int, quant_type: str) -> bool:
    """Whether rows of this size are dequantised as the same numbers in a single long row.

    bitsandbytes 0.50.2 does not on CPUs with AVX-512.
    """
    from bitsandbytes import functional

    rows = torch.randn(blocksize, entries, generator=torch.Generator().manual_seed(0))
    data, state = functional.quantize_4bit(rows, blocksize=blocksize, quant_type=quant_type)
    by_rows = functional.dequantize_4bit(data, state)
    state.shape = torch.Size([1, rows.numel()])
    return torch.equal(by_rows, functional.dequantize_4bit(data, state).view_as(rows))


def _reading_right(kind: Any) -> Any:
    """The forward method of a class of 4-bit layers, which on a CPU reads uneven rows right."""

    def forward(layer: Any, x: Tensor) -> Tensor:
        """Computes ``W x + bias``, (..., m), in the dtype of x."""
        if x.device.type != "cpu" or layer.weight.quant_state is None:
            return kind.forward(layer, x)  # type: ignore[no-any-return]
        compute = layer_compute_dtype(layer, x)
        bias = None if layer.bias is None else layer.bias.to(compute)
        # The weight is asked for each time: in the backward pass it may lie elsewhere.
        weight = partial(dense_weight, layer, often=True)
        return call_sharing(FrozenProduct, x.to(compute), bias, weight).to(x.dtype)

    # Tracing what is asked of bitsandbytes' subclass of tensors recurses without end.
    return torch.compiler.disable(forward)  # type: ignore[no-untyped-call]
