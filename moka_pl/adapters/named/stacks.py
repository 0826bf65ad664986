"""The factors of the adapters of a batch, put side by side for all layers at once.

A layer by itself would take dozens of launches, which is longer than the layer runs. Layers whose adapters
have the same shapes share them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.adapters.layer import MokaLayer
from moka_pl.ops.gating import Gating, gates_of
from moka_pl.ops.layout import Shape
from moka_pl.ops.rows import stack_factors

#: Bytes of packed factors that are put side by side at once: what is needed meanwhile is several times that.
_CHUNK = 2**28


class Stack(NamedTuple):
    """Adapters of the same shapes over one layer.

    Attributes:
        names: Their names.
        shapes: Their r shapes.
        factors: Their factors as :func:`moka_pl.ops.rows.rows_update` takes them, shape (K, entries).
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    factors: Tensor


class _Kind(NamedTuple):
    """What adapted layers must have in common to be put side by side."""

    shapes: tuple[Shape, ...]
    m: int
    dtype: torch.dtype
    device: torch.device


@torch.no_grad()
def stack_layers(layers: Mapping[str, Mapping[str, MokaLayer]]) -> dict[str, list[Stack]]:
    """Puts the factors of each layer's adapters side by side.

    Args:
        layers: The adapted layers over each layer, by the layer's and the adapter's name.
    """
    kinds: dict[_Kind, dict[str, list[str]]] = {}
    for target, adapters in layers.items():
        for name, layer in adapters.items():
            kind = _Kind(layer.shapes, layer.out_features, layer.moka_B.dtype, layer.moka_B.device)
            kinds.setdefault(kind, {}).setdefault(target, []).append(name)
    stacks: dict[str, list[Stack]] = {target: [] for target in layers}
    for kind, targets in kinds.items():
        for chunk in _chunks(targets, layers):
            members = [layers[target][name] for target in chunk for name in targets[target]]
            factors = torch.split(_stack(members, kind), [len(targets[target]) for target in chunk])
            for target, own in zip(chunk, factors, strict=True):
                stacks[target].append(Stack(tuple(targets[target]), kind.shapes, own))
    return stacks


def _chunks(
    targets: Mapping[str, list[str]], layers: Mapping[str, Mapping[str, MokaLayer]]
) -> Iterator[list[str]]:
    """Splits layers into lists whose adapters' factors are small enough."""
    target, names = next(iter(targets.items()))
    one = 4 * sum(part.numel() for part in _factors(layers[target][names[0]]))
    count = max(_CHUNK // (one * max(map(len, targets.values()))), 1)
    listed = list(targets)
    for start in range(0, len(listed), count):
        yield listed[start : start + count]


def _stack(members: Sequence[MokaLayer], kind: _Kind) -> Tensor:
    """Returns the factors of adapted layers of one kind, in single precision at least."""
    parts = zip(*map(_factors, members), strict=True)
    wide = torch.promote_types(kind.dtype, torch.float32)
    left, right = (torch.stack(part).to(wide) for part in parts)
    return stack_factors(left, right, _weights(members, right), kind.shapes, kind.m)


def _factors(layer: MokaLayer) -> tuple[Tensor, Tensor]:
    """Returns packed left and right factors."""
    right = layer.moka_B
    return right.new_empty(0) if layer.moka_A is None else layer.moka_A, right


def _weights(members: Sequence[MokaLayer], like: Tensor) -> Tensor:
    """Returns gates times scaling, shape (K, r), of the dtype and on the device of ``like``."""
    r = len(members[0].shapes)
    alpha = like.new_full((len(members), r), 1 / r)  # (K, r)
    kinds: dict[Gating, list[int]] = {}
    for i, layer in enumerate(members):
        if layer.moka_gate is not None:
            kinds.setdefault(layer.gating, []).append(i)
    for gating, which in kinds.items():
        logits = [gate.to(like) for i in which if (gate := members[i].moka_gate) is not None]
        gates = gates_of(torch.stack(logits), gating)
        every = len(which) == len(members)
        alpha = gates if every else alpha.index_copy(0, torch.tensor(which, device=like.device), gates)
    scalings = [layer.scaling for layer in members]
    if len(set(scalings)) == 1:
        return alpha * scalings[0]
    return alpha * torch.tensor(scalings, dtype=like.dtype, device=like.device)[:, None]
