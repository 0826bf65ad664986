"""Checkpoints that are quantised already: how, and their layers, read as they are."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.backbone.quantization.kinds import KINDS, Quantization
from moka_pl.backbone.quantization.registry import READERS
from moka_pl.backbone.quantization.stored import LayerTensors, QuantisedLinear
from moka_pl.errors import BackboneError


class QuantisedError(BackboneError):
    """A checkpoint is quantised already in another way than was asked for.

    Attributes:
        stored: How it is.
    """

    def __init__(self, name: str, stored: Quantization, asked: Quantization) -> None:
        self.stored = stored
        super().__init__(
            f"{name} is quantised already, as {stored}, and cannot be loaded with quantization {asked}; set "
            f"--model.backbone.quantization {stored}, or give its unquantised original"
        )


def stored_quantization(stored: Mapping[str, Any], name: str) -> tuple[Quantization, bool]:
    """Returns how a checkpoint is quantised already, and whether its block scales are, too.

    Args:
        stored: The ``quantization_config`` of its ``config.json``.
        name: The model's name, for messages.

    Raises:
        BackboneError: For a format that is not read here.
    """
    kind, method = stored.get("bnb_4bit_quant_type", "fp4"), stored.get("quant_method", "an unnamed method")
    if stored.get("load_in_4bit") is True and kind in ("nf4", "fp4"):
        return kind, bool(stored.get("bnb_4bit_use_double_quant", False))
    bits = " in 8 bits" if stored.get("load_in_8bit") is True else ""
    reader = READERS.get("int8" if bits else method)
    if reader is None:
        raise BackboneError(
            f"{name} is quantised already, by {method}{bits}, and cannot be trained on; give its unquantised "
            f"original, or one in bitsandbytes' nf4, fp4 or int8, GPTQ or AWQ"
        )
    if (reason := reader.unreadable_reason(stored)) is not None:
        raise BackboneError(
            f"{name} is quantised already, by {reader.kind} {reason}, and cannot be trained on; give its "
            "unquantised original"
        )
    return reader.kind, True


def check_made(quantization: Quantization, name: str) -> None:
    """Refuses to quantise a model in a way that is only read.

    Raises:
        BackboneError: Naming what to do instead.
    """
    if quantization != "none" and not KINDS[quantization].made:
        raise BackboneError(
            f"{name} is not quantised by {quantization}, and moka_pl only reads that; set "
            "--model.backbone.quantization nf4 (or another), or give a checkpoint that is"
        )


class StoredLayers:
    """The quantised layers of a checkpoint, which are read as they are.

    Args:
        kind: How they are stored.
        config: The checkpoint's ``quantization_config``.
        tensors: Names of all of its tensors.
    """

    def __init__(self, kind: Quantization, config: Mapping[str, Any], tensors: Collection[str]) -> None:
        self._class, self._config, self._tensors = READERS[kind], config, tensors
        first, *others = self._class.parts[::-1]
        found = (name.removesuffix(f".{first}") for name in tensors if name.endswith(f".{first}"))
        self.layers = {name for name in found if all(f"{name}.{part}" in tensors for part in others)}

    @property
    def names(self) -> set[str]:
        """Names of the tensors that the same checkpoint would have unquantised."""
        parts = (*self._class.parts, *self._class.optional_parts)
        stored = {f"{layer}.{part}" for layer in self.layers for part in parts}
        return set(self._tensors) - stored | {f"{layer}.weight" for layer in self.layers}

    @property
    def biases(self) -> set[str]:
        """Names that biases of the layers would have; one that the model has not is looked at in reading."""
        return {f"{layer}.bias" for layer in self.layers}

    def read(
        self, name: str, layer: nn.Linear, tensor: Callable[[str], Tensor], dtype: torch.dtype
    ) -> QuantisedLinear:
        """Builds one of the layers, with a bias where it has one.

        Args:
            name: Its name.
            layer: The layer whose place it is to take, without a weight.
            tensor: Reads a tensor by its name, onto the device of the new layer.
            dtype: Compute dtype.

        Raises:
            BackboneError: If its tensors do not fit.
        """
        parts = {part: tensor(f"{name}.{part}") for part in self._class.parts}
        optional = (part for part in self._class.optional_parts if f"{name}.{part}" in self._tensors)
        parts |= {part: tensor(f"{name}.{part}") for part in optional}
        sizes = layer.out_features, layer.in_features
        try:
            codes, stored = self._class.read_layer(LayerTensors(parts, sizes, dtype, self._config))
        except BackboneError as error:
            raise BackboneError(f"{name}: {error}") from error
        bias = tensor(f"{name}.bias").to(dtype) if f"{name}.bias" in self._tensors else None
        own: Tensor | None = layer.bias
        if own is None and bias is not None:
            if bool(bias.any()):
                raise BackboneError(f"{name} has a bias, but config.json names none; copy the model again")
            bias = None  # some tools write zeros for every layer
        made = None if bias is None else nn.Parameter(bias, requires_grad=False)
        return QuantisedLinear(codes, stored, made, dtype)


def stored_layers(
    config: Mapping[str, Any] | None, kind: Quantization, tensors: Collection[str] | None
) -> StoredLayers | None:
    """Returns the layers of a checkpoint that are read here; None where there are none.

    Args:
        config: The checkpoint's ``quantization_config``.
        kind: How it is quantised.
        tensors: Names of all tensors of its safetensors files.
    """
    if config is None or kind not in READERS:
        return None
    return StoredLayers(kind, config, tensors or ())
