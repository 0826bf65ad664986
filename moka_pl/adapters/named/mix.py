"""A weighted sum of adapters, which is an adapter again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import listed
from moka_pl.adapters.layer import MokaLayer
from moka_pl.errors import AdapterError
from moka_pl.ops.layout import Shape, pack

#: A component of zeros: all layers have as many components, though fewer adapters be in some.
_EMPTY = Shape(1, 1, 1, 1)


def mixed(
    adapters: Sequence[Mapping[str, MokaLayer]], weights: Sequence[float]
) -> tuple[MokaConfig, dict[str, MokaLayer]]:
    """Returns the adapter ``ΔW = Σ_k w_k ΔW_k``, its configuration and its layers.

    The components of all adapters lie side by side, without gates: a component's weight in its adapter, times
    w_k, is in its right factor.

    Args:
        adapters: The layers of each adapter by name.
        weights: w of each.

    Raises:
        AdapterError: If a weight is so large that a factor of the sum is not finite.
        ConfigError: If the adapters together have too many components, or factors larger than a layer.
    """
    names = list(dict.fromkeys(name for layers in adapters for name in layers))
    weighted = list(zip(adapters, weights, strict=True))
    parts = {name: [p for layers, w in weighted for p in _parts(layers.get(name), w)] for name in names}
    components = max(map(len, parts.values()))
    for members in parts.values():
        empty = members[0][1][1].new_zeros(1, 1)
        members += [(_EMPTY, (empty, empty))] * (components - len(members))
    config = MokaConfig(
        components=components,
        filters={name: [listed(shape) for shape, _ in members] for name, members in parts.items()},
        gating="none",
        scaling=float(components),  # times the gates 1/r: one
        target_modules=names,
    )
    built = {}
    for name, members in parts.items():
        source = next(layers[name] for layers in adapters if name in layers)
        layer = type(source)(source.base_layer, config, members[0][1][1].dtype, name)  # type: ignore[arg-type]
        left, right = pack([pair for _, pair in members])
        if not right.isfinite().all():
            raise AdapterError(
                f"with weights {list(weights)} factors of {name} are not finite numbers; give smaller weights"
            )
        with torch.no_grad():
            layer.moka_B.copy_(right)
            if layer.moka_A is not None:
                layer.moka_A.copy_(left)
        built[name] = layer
    return config, built


def _parts(layer: MokaLayer | None, weight: float) -> list[tuple[Shape, tuple[Tensor | None, Tensor]]]:
    """Returns shape and factors of each component of a layer, with its weight in the right factor."""
    if layer is None:
        return []
    with torch.no_grad():
        weights = layer.gates() * (layer.scaling * weight)  # (r,)
        return [
            (shape, (a, w * b))
            for shape, (a, b), w in zip(layer.shapes, layer.factors(), weights, strict=True)
        ]


def check_weights(adapters: Sequence[str], weights: Sequence[float]) -> None:
    """Refuses weights that are not one finite number for each adapter."""
    if len(adapters) != len(weights) or not adapters:
        raise AdapterError(f"{len(adapters)} adapters have {len(weights)} weights; give one for each")
    if bad := [w for w in weights if not torch.isfinite(torch.tensor(float(w)))]:
        raise AdapterError(f"a weight is {bad[0]}; give finite numbers")
