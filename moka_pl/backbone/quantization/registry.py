"""Which class stores weights of which kind."""

from moka_pl.backbone.quantization.int8 import Int8Weight
from moka_pl.backbone.quantization.kinds import Quantization
from moka_pl.backbone.quantization.stored import StoredWeight

_CLASSES: tuple[type[StoredWeight], ...] = (Int8Weight,)


def weight_class(quantization: Quantization) -> type[StoredWeight]:
    """Returns the class that stores weights of a kind."""
    return next(one for one in _CLASSES if one.kind == quantization)
