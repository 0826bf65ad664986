"""All numbers of an adapter directory."""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.injection import moka_layers
from moka_pl.adapters.methods.base import AdapterMethod
from moka_pl.adapters.methods.registry import method_of
from moka_pl.adapters.reading import (
    AdapterInfo,
    local_adapter,
    read_adapter,
    read_adapter_state,
    read_counted_shapes,
)
from moka_pl.adapters.schema import shown
from moka_pl.backbone.quantization import dense_weight
from moka_pl.inspection.layers import Layer, Size, read_layers, sizes_certain
from moka_pl.ops.spectrum import Spectrum, component_norms, norm_and_stable_rank, update_spectrum

#: The base that an adapter directory names.
STORED = "stored"
#: Bytes of tensors that are read whole.
_SMALL = 2**30
#: Entries of the largest matrix that is made; multiply-adds of all spectra, unless they are asked for.
LARGEST, _PATIENCE = 2**28, 2 * 10**11
#: Multiply-adds a second, on one core.
_RATE = 10**10


@dataclass(frozen=True)
class LayerNumbers:
    """The numbers of one layer.

    Attributes:
        layer: The layer.
        component_norms: ‖s α_i (A_i ⊗ B_i)‖ of each component; empty where the layer's size is unknown.
        norm: ‖ΔW‖; None where the layer's size is unknown.
        stable_rank: ‖ΔW‖² / σ_1²; None likewise.
        spectrum: Singular values and ranks of ΔW; None where they were left out.
        base_norm: ‖W‖ of the frozen weight; None without the base.
    """

    layer: Layer
    component_norms: list[float] = field(default_factory=list)
    norm: float | None = None
    stable_rank: float | None = None
    spectrum: Spectrum | None = None
    base_norm: float | None = None

    @property
    def name(self) -> str:
        """The layer's full name."""
        return self.layer.name

    @property
    def relative_norm(self) -> float | None:
        """‖ΔW‖ / ‖W‖; None where one of them is unknown, or W is 0."""
        return self.norm / self.base_norm if self.norm is not None and self.base_norm else None

    @property
    def exact_lora_rank(self) -> int | None:
        """The rank of the LoRA that ΔW is exactly."""
        return None if self.layer.update is None else self.layer.update.lora_rank


@dataclass(frozen=True)
class Inspection:
    """What an adapter directory holds.

    Attributes:
        path: The directory.
        info: What its configuration says.
        method: Its method.
        parameters: Entries of all its tensors.
        layers: Numbers by layer, in the model's order; empty for other methods than MoKA.
        left_out: Sentences on what is missing, and how to get it.
    """

    path: Path
    info: AdapterInfo
    method: AdapterMethod
    parameters: int
    layers: list[LayerNumbers]
    left_out: list[str]

    @property
    def gated(self) -> list[Layer]:
        """The layers whose gates can move."""
        return [numbers.layer for numbers in self.layers if numbers.layer.entropy is not None]

    @property
    def metrics_step(self) -> int | None:
        """The step that the metrics were measured at."""
        found: int | None = self.info.extra.get("metrics_step")
        return self.info.extra.get("step") if found is None else found


def check_adapter(path: Path) -> None:
    """Refuses what :func:`inspect_adapter` cannot read, without loading a base.

    Args:
        path: The directory, or the hub id of one.

    Raises:
        AdapterError: If it is damaged.
    """
    path = local_adapter(path)
    read_adapter(path)
    _read_small(path, read_counted_shapes(path))


def _read_small(path: Path, shapes: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """Reads tensors, and looks for NaN in every number; None where they are too large."""
    small = sum(tensor.nbytes for tensor in shapes.values()) <= _SMALL
    return read_adapter_state(path) if small else None


def inspect_adapter(path: Path, base: str | None = None, spectra: bool = False) -> Inspection:
    """Computes the numbers of an adapter directory.

    Args:
        path: The directory, or the hub id of one.
        base: Name or folder of the base model, which is then loaded; ``stored`` is the adapter's own.
        spectra: Whether to compute singular values however long they take.

    Raises:
        AdapterError: If the directory is damaged, or of another base.
        BackboneError: If the base cannot be loaded.
    """
    path = local_adapter(path)
    info, shapes = read_adapter(path), read_counted_shapes(path)
    method = method_of(info.config)
    size = sum(tensor.numel() for tensor in shapes.values())
    config: Any = info.config
    state = _read_small(path, shapes)
    left_out = []
    if state is None:
        state, left_out = {}, [f"all numbers of layers: the tensors are larger than {_SMALL:,} bytes"]
    if not isinstance(config, MokaConfig):
        left_out = [f"numbers of layers: they are MoKA's, and this adapter is {method.title}"]
        return Inspection(path, info, method, size, [], left_out)
    weights = {} if base is None else base_weights(path, None if base == STORED else base)
    sizes = {name: Size(*features) for name, features in info.layer_sizes.items()}
    sizes |= {name: size for name, (size, _) in weights.items()}
    layers = read_layers(path, config, state, sizes)
    if base is None and layers:
        left_out.append("‖ΔW‖ / ‖W‖: it needs the base; --base stored loads it")
        if any(layer.update is None for layer in layers):
            left_out.append("norms and ranks: the layers' sizes are unknown; --base stored tells them")
        elif any(layer.name not in sizes for layer in layers) and not sizes_certain(config, layers):
            left_out.append("sizes of layers: taken from the factors, of which the layers may cut something")
    numbers = [LayerNumbers(layer, base_norm=weights.get(layer.name, (None, None))[1]) for layer in layers]
    return Inspection(path, info, method, size, _filled(numbers, spectra, left_out), left_out)


def _filled(numbers: list[LayerNumbers], spectra: bool, left_out: list[str]) -> list[LayerNumbers]:
    """Adds norms and spectra, and says what is left out.

    Args:
        numbers: The layers.
        spectra: Whether to compute singular values however long they take.
        left_out: Sentences, to which some are added.
    """
    updates = {n.name: n.layer.update for n in numbers if n.layer.update is not None}
    fitting = {name: update for name, update in updates.items() if update.entries <= LARGEST}
    if len(fitting) < len(updates):
        first = next(name for name in updates if name not in fitting)
        left_out.append(
            f"norms and ranks of {len(updates) - len(fitting)} layers (first {shown(first)}): they take "
            f"matrices of more than {LARGEST:,} entries"
        )
    cost = sum(update.cost for update in fitting.values())
    whole = spectra or cost <= _PATIENCE
    if not whole:
        left_out.append(
            f"entropy ranks and singular values: about {math.ceil(cost / _RATE / 60)} minutes on one core; "
            "--spectra computes them"
        )
    filled = []
    for n in numbers:
        if (update := fitting.get(n.name)) is None:
            filled.append(n)
            continue
        spectrum = update_spectrum(update) if whole else None
        norm, stable_rank = (
            (spectrum.norm, spectrum.stable_rank) if spectrum else norm_and_stable_rank(update)
        )
        filled.append(
            replace(
                n,
                component_norms=component_norms(update).tolist(),
                norm=norm,
                stable_rank=stable_rank,
                spectrum=spectrum,
            )
        )
    return filled


def base_weights(path: Path, base: str | None) -> dict[str, tuple[Size, float]]:
    """Loads an adapter with its base; returns size and ‖W‖ of every adapted layer.

    W is what the adapter is applied to: where the base is quantised, its dequantised weights.

    Args:
        path: The adapter directory.
        base: Name or folder of the base; None is the one stored with the adapter.

    Raises:
        AdapterError: If the base is another one.
        BackboneError: If it cannot be loaded.
    """
    if read_adapter(path).labels:
        from moka_pl.vision import load_classifier

        model: nn.Module = load_classifier(path, "cpu", base)[0]
    else:
        from moka_pl.inference import load_model

        model = load_model(path, "cpu", base)[0]
    return {
        name: (
            Size(layer.out_features, layer.in_features),
            float(dense_weight(layer.base_layer).float().norm()),
        )
        for name, layer in moka_layers(model).items()
    }
