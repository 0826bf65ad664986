"""Which class stores weights of which kind, and the package that it needs."""

from torch import nn

from moka_pl.backbone.quantization.four_bit import import_bitsandbytes
from moka_pl.backbone.quantization.grouped import AwqWeight, GptqWeight
from moka_pl.backbone.quantization.hqq import HqqWeight
from moka_pl.backbone.quantization.int8 import Int8Weight
from moka_pl.backbone.quantization.kinds import KINDS, Quantization
from moka_pl.backbone.quantization.stored import MadeWeight, ReadWeight
from moka_pl.backbone.quantization.torchao import Float8Weight, Int4Weight
from moka_pl.errors import BackboneError, one_line

#: The classes of weights that are quantised here, and of those that are read from checkpoints, by kind.
MAKERS: dict[Quantization, type[MadeWeight]] = {
    maker.kind: maker for maker in (Int8Weight, Int4Weight, Float8Weight, HqqWeight)
}
READERS: dict[Quantization, type[ReadWeight]] = {
    reader.kind: reader for reader in (Int8Weight, GptqWeight, AwqWeight)
}


def import_quantiser(quantization: Quantization) -> None:
    """Imports the package that a kind needs, ahead of everything that takes time.

    Raises:
        BackboneError: If it is not installed, or does not go with what is.
    """
    package = None if quantization == "none" else KINDS[quantization].package
    if package == "bitsandbytes":
        import_bitsandbytes()
    elif package is not None:
        try:
            MAKERS[quantization].import_package()
        except ImportError as error:
            raise BackboneError(
                f"quantization {quantization} needs {package} ({one_line(error)}): "
                f"pip install 'moka_pl[{package}]'"
            ) from error


def check_layers(model: nn.Module, quantization: Quantization) -> None:
    """Refuses a model with layers that a kind cannot store, before any weight is loaded.

    Args:
        model: The model, perhaps on the meta device.
        quantization: How linear weights are to be stored.

    Raises:
        BackboneError: Naming the first such layer.
    """
    if quantization not in MAKERS:
        return
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and layer is not head:
            check_layer(layer, quantization, name)


def check_layer(layer: nn.Linear, quantization: Quantization, name: str = "a layer") -> None:
    """Refuses a layer that a kind cannot store.

    Args:
        layer: The layer.
        quantization: How its weight is to be stored, one of ``MAKERS``.
        name: Its name, for messages.

    Raises:
        BackboneError: If its sizes do not fit.
    """
    m, n = layer.out_features, layer.in_features
    if (reason := MAKERS[quantization].unsupported_reason(m, n)) is not None:
        raise BackboneError(
            f"quantization {quantization} cannot store {name} of {m} × {n}: {reason}; set quantization: nf4"
        )
