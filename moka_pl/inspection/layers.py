"""The layers of an adapter directory as updates, from its tensors alone."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.adapters.config import MokaConfig
from moka_pl.adapters.filters import filter_shapes
from moka_pl.adapters.schema import shown
from moka_pl.errors import AdapterError, ConfigError
from moka_pl.ops.gating import can_move, gates_of, normalised_entropy
from moka_pl.ops.layout import Shape, pack
from moka_pl.ops.spectrum import Update

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


class Size(NamedTuple):
    """Features of a layer.

    Attributes:
        m: Output features.
        n: Input features.
    """

    m: int
    n: int


@dataclass(frozen=True)
class Layer:
    """An adapted layer.

    Attributes:
        name: Its full name.
        update: Its ΔW; None where the layer's size is unknown.
        alpha: The gates α, (r,), float32.
        entropy: Their normalised entropy; None where the gates cannot move.
        shapes: Shapes of the components; empty where the layer's size is unknown.
    """

    name: str
    update: Update | None
    alpha: Tensor
    entropy: float | None
    shapes: tuple[Shape, ...]

    @property
    def number(self) -> int:
        """Which layer of the model it belongs to; -1 where its name has no number."""
        match = _NUMBER.search(self.name)
        return -1 if match is None else int(match[0][:18])

    @property
    def kind(self) -> str:
        """The name with ``*`` for the layer's number: the same for all layers of a projection."""
        return _NUMBER.sub("*", self.name, count=1)


def short_labels(layers: Sequence[Layer]) -> list[str]:
    """Names such as ``layer03.q_proj``, as in a run's log; layers that would share one keep the full name."""

    def label(layer: Layer) -> str:
        last = layer.name.rpartition(".")[2]
        return layer.name if layer.number < 0 else f"layer{layer.number:02d}.{last}"

    count = Counter(map(label, layers))
    return [label(layer) if count[label(layer)] == 1 else layer.name for layer in layers]


def by_number(name: str) -> list[tuple[int, str]]:
    """Orders layers as the model does, 2 before 10."""
    return [(int(part[:18]), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def read_layers(
    path: Path, config: MokaConfig, state: Mapping[str, Tensor], sizes: Mapping[str, Size]
) -> list[Layer]:
    """Takes an adapter's tensors apart, in the model's order.

    Args:
        path: The adapter directory, for messages.
        config: Its configuration.
        state: Its tensors.
        sizes: Sizes of layers, where they are known; the others' are told from their factors.

    Raises:
        AdapterError: If tensors are missing, or of other sizes than the configuration says.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, part = key.rpartition(".moka_")
        if not name:  # rows of tokens or a layer that was trained whole, which are no update
            continue
        found.setdefault(name, {})[part] = tensor
    return [_layer(path, name, config, found[name], sizes.get(name)) for name in sorted(found, key=by_number)]


def _layer(
    path: Path, name: str, config: MokaConfig, tensors: Mapping[str, Tensor], size: Size | None
) -> Layer:
    r = config.components
    gate = tensors.get("gate")
    if config.gating != "none" and gate is None:
        raise AdapterError(
            f"{path} does not fit together: {name}.moka_gate is missing. Copy the adapter again"
        )
    if gate is not None and gate.shape != (r,):
        raise AdapterError(
            f"{path} does not fit together: {name}.moka_gate is {tuple(gate.shape)}, but "
            f"components is {r}. Copy the adapter again"
        )
    alpha = torch.full((r,), 1 / r) if gate is None else gates_of(gate.float(), config.gating)  # (r,)
    moves = gate is not None and can_move(config.gating, r)
    entropy = float(normalised_entropy(alpha[None])) if moves else None
    pairs = [(tensors.get(f"A.{i}"), tensors.get(f"B.{i}")) for i in range(r)]
    factors = [(a, b) for a, b in pairs if b is not None and b.ndim == 2 and (a is None or a.ndim == 2)]
    if len(factors) < r:
        raise AdapterError(
            f"{path} does not fit together: {name} has {len(factors)} pairs of factors, but components is "
            f"{r}. Copy the adapter again"
        )
    shapes = _shapes(path, name, config, factors, size)
    if shapes is None:
        return Layer(name, None, alpha, entropy, ())
    size = size or _told_size(shapes)
    left, right = pack(factors)
    update = Update(alpha * config.effective_scaling, left, right, shapes, *size)
    return Layer(name, update, alpha, entropy, shapes)


def _shapes(
    path: Path,
    name: str,
    config: MokaConfig,
    factors: list[tuple[Tensor | None, Tensor]],
    size: Size | None,
) -> tuple[Shape, ...] | None:
    """Returns the components' shapes; None where only the layer's size could tell them.

    Raises:
        AdapterError: If the factors are not those of a layer of that size.
    """
    expected: tuple[Shape, ...] = ()
    if size is not None:
        try:
            expected = config.shapes_of(name, *size)
        except ConfigError as error:
            raise AdapterError(f"{path} does not fit together: {name}: {error}") from error
    elif any(a is None for a, _ in factors):
        expected = _listed(config, name)
        if not expected:
            return None
    held = [(*(a.shape if a is not None else ()), *b.shape) for a, b in factors]
    if expected and held != [s[2:4] if s.identity else s[:4] for s in expected]:
        raise AdapterError(
            f"{path} does not fit together: the factors of {name} are {shown(held)}, not "
            f"{', '.join(map(str, expected))}. Copy the adapter again"
        )
    return expected or tuple(Shape(*sizes) for sizes in held)


def _listed(config: MokaConfig, name: str) -> tuple[Shape, ...]:
    """Shapes that the configuration lists whole, whatever the layer's size."""
    filters = config.filters.get(name) if isinstance(config.filters, dict) else config.filters
    if filters is None or isinstance(filters, str) or any(len(sizes) == 2 for sizes in filters):
        return ()
    return filter_shapes(filters, config.components, 1 << 30, 1 << 30)


def _told_size(shapes: tuple[Shape, ...]) -> Size:
    """The size of a layer as its factors tell it.

    Components that fill a layer whose sides they divide are as large as it. Where they stand out, those that
    stand out least tell most.
    """
    return Size(min(shape.rows for shape in shapes), min(shape.cols for shape in shapes))


def sizes_certain(config: MokaConfig, layers: list[Layer]) -> bool:
    """Whether no layers of other sizes could have these factors, as the configuration makes them."""
    filters = config.filters
    if not isinstance(filters, str):
        return False

    def only(update: Update) -> bool:
        for m, n in ((update.m - 1, update.n), (update.m, update.n - 1)):
            with suppress(ConfigError):
                if (
                    min(m, n)
                    and filter_shapes(filters, config.components, m, n, config.rank) == update.shapes
                ):
                    return False
        return True

    known = {(u.m, u.n): u for layer in layers if (u := layer.update) is not None}
    return all(only(update) for update in known.values())
