"""The one place that knows quantisers: everything else asks the functions here.

:mod:`.kinds` says what kinds there are, :mod:`.layers` answers what is asked of a layer's weight. One more
quantiser is a line in the first, and a class of :mod:`.stored`'s that :mod:`.registry` names.
"""

from moka_pl.backbone.quantization.checkpoints import (
    QuantisedError,
    StoredLayers,
    check_made,
    stored_layers,
    stored_quantization,
)
from moka_pl.backbone.quantization.four_bit import (
    NF4_LEVELS,
    forget_scales,
    is_four_bit,
    without_kept_scales,
)
from moka_pl.backbone.quantization.keeping import keep_weights
from moka_pl.backbone.quantization.kinds import (
    Quantization,
    dequantising_bytes,
    loading_options,
    quantises_layers,
    quantises_loading,
    rounding_of,
    weight_bytes,
)
from moka_pl.backbone.quantization.layers import (
    base_bytes,
    check_dense,
    dense_weight,
    frozen_output,
    is_quantised,
    is_quantised_kind,
    is_stored_quantised,
    kernel_weight,
    layer_compute_dtype,
    merged_linear,
    merged_weight,
    quantised_linear,
    quantization_of,
    relative_entries,
    storage_device,
    storage_of,
    weight_count,
    weight_scales,
)
from moka_pl.backbone.quantization.registry import check_layers, import_quantiser
from moka_pl.backbone.quantization.saving import release_saving, settle_saving
from moka_pl.backbone.quantization.stored import FrozenProduct, QuantisedLinear

__all__ = [
    "NF4_LEVELS",
    "FrozenProduct",
    "QuantisedError",
    "QuantisedLinear",
    "Quantization",
    "StoredLayers",
    "base_bytes",
    "check_dense",
    "check_layers",
    "check_made",
    "dense_weight",
    "dequantising_bytes",
    "forget_scales",
    "frozen_output",
    "import_quantiser",
    "is_four_bit",
    "is_quantised",
    "is_quantised_kind",
    "is_stored_quantised",
    "keep_weights",
    "kernel_weight",
    "layer_compute_dtype",
    "loading_options",
    "merged_linear",
    "merged_weight",
    "quantised_linear",
    "quantises_layers",
    "quantises_loading",
    "quantization_of",
    "relative_entries",
    "release_saving",
    "rounding_of",
    "settle_saving",
    "storage_device",
    "storage_of",
    "stored_layers",
    "stored_quantization",
    "weight_bytes",
    "weight_count",
    "weight_scales",
    "without_kept_scales",
]
