"""The kinds of quantised weights: what each takes, what it needs, and how a checkpoint names it."""

from typing import Any, Literal, NamedTuple

import torch

Quantization = Literal["nf4", "fp4", "int8", "int4", "float8", "hqq", "gptq", "awq", "none"]
Rounding = Literal["same", "next", "far"]


class Kind(NamedTuple):
    """What there is to know of a kind of quantised weights.

    Attributes:
        size: Bytes of a weight, with its share of scales that have a dtype of their own; of bitsandbytes' 4
            bits without the second quantisation.
        double: The same with the second quantisation, where there is one.
        scales: Numbers of the compute dtype beside it.
        held: Bytes of a weight at the most while it is dequantised, beside ``copies`` in the compute dtype.
        copies: See ``held``.
        package: The package that makes and reads it; None for PyTorch alone.
        made: Whether weights can be quantised so here; else only checkpoints are read.
        loaded: Whether transformers quantises while it loads; else weights are quantised layer by layer.
        rounding: How far the nearest of NF4's levels may be from that of what a weight was made of: the
            ``same``, some the ``next`` one, or many a ``far`` one.
    """

    size: float
    double: float | None = None
    scales: float = 0.0
    held: float = 0.0
    copies: float = 1.0
    package: str | None = "bitsandbytes"
    made: bool = True
    loaded: bool = False
    rounding: Rounding = "far"


#: A code of four bits, a float32 scale for 64 of them, or 8 bits for that with one scale for 256 of these.
_SINGLE, _DOUBLE = 0.5 + 4 / 64, 0.5 + (1 + 4 / 256) / 64

#: The usual checkpoint: 4 bits, a float16 scale and a zero point of 4 bits for 128 of them.
_GROUPS_OF_128 = 0.5 + (2 + 0.5) / 128

KINDS: dict[str, Kind] = {
    "nf4": Kind(_SINGLE, _DOUBLE, loaded=True, rounding="same"),
    "fp4": Kind(_SINGLE, _DOUBLE, loaded=True),
    "int8": Kind(1.0, held=8, copies=0, rounding="next"),
    "int4": Kind(0.5 + 1 / 64, scales=1 / 64, held=1, copies=2, package="torchao"),
    "float8": Kind(1.0, held=10, copies=0, package="torchao"),
    "hqq": Kind(0.5, scales=2 / 64, copies=3, package="hqq"),
    "gptq": Kind(_GROUPS_OF_128, held=11, copies=0, package=None, made=False),
    "awq": Kind(_GROUPS_OF_128, held=5, package=None, made=False),
}


def weight_bytes(quantization: Quantization, double: bool, dtype: torch.dtype) -> float:
    """Returns the bytes of a linear weight, with its share of scales.

    Args:
        quantization: How linear weights are stored.
        double: Whether the block scales are quantised, too.
        dtype: Compute dtype.
    """
    if quantization == "none":
        return dtype.itemsize
    kind = KINDS[quantization]
    size = kind.double if double and kind.double is not None else kind.size
    return size + kind.scales * dtype.itemsize


def dequantising_bytes(quantization: Quantization, dtype: torch.dtype) -> float:
    """Returns the bytes that a linear weight takes at the most while it is dequantised; 0 where it is not."""
    if quantization == "none":
        return 0.0
    kind = KINDS[quantization]
    return kind.held + kind.copies * dtype.itemsize


def quantises_loading(quantization: Quantization) -> bool:
    """Whether transformers quantises while it loads."""
    return quantization != "none" and KINDS[quantization].loaded


def quantises_layers(quantization: Quantization) -> bool:
    """Whether layers are quantised, or read quantised, here and one by one."""
    return quantization != "none" and not KINDS[quantization].loaded


def rounding_of(storage: str) -> Rounding:
    """Returns how far weights stored so (``nf4-bfloat16``) may be from what they were made of."""
    kind = KINDS.get(storage.partition("-")[0])
    return "same" if kind is None else kind.rounding


def loading_options(quantization: Quantization, double: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Returns the options that make transformers quantise a model while it is loaded.

    Args:
        quantization: How linear weights are stored.
        double: Whether the block scales are quantised, too.
        dtype: Compute dtype.
    """
    if not quantises_loading(quantization):
        return {}
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": config}
