"""Layers of bitsandbytes' 4 bits, and their W without bitsandbytes' kernels."""

import bitsandbytes as bnb
import torch
from torch import Tensor, nn


def quantised(n: int, m: int = 64, **options) -> bnb.nn.Linear4bit:
    torch.manual_seed(0)
    dense = nn.Linear(n, m)
    options = {"compute_dtype": torch.float32, "quant_type": "nf4"} | options
    layer = bnb.nn.Linear4bit(n, m, **options)
    layer.load_state_dict(dense.state_dict())
    layer.to("cpu").requires_grad_(False)
    # As on a CPU with bfloat16 instructions, whatever this one has.
    layer.support_avx512bf16_for_cpu = True
    return layer


def read_by_hand(layer: bnb.nn.Linear4bit) -> Tensor:
    """Codes times scales, whose blocks run on over the rows, (m, n)."""
    state, data = layer.weight.quant_state, layer.weight.data.flatten()
    scales = state.absmax
    if state.nested:
        scales = bnb.functional.dequantize_blockwise(scales, state.state2) + state.offset
    codes = torch.stack([data >> 4, data & 15], 1).flatten()[: state.shape.numel()]
    spread = scales.repeat_interleave(state.blocksize)[: len(codes)]
    return (state.code[codes.long()] * spread).view(state.shape)
