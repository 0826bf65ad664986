"""The factors of the adapters of a batch, put side by side for all layers at once.

A layer by itself would take dozens of launches, which is longer than the layer runs. Layers whose adapters
have the same shapes share them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.adapters.layer import MokaLayer
from moka_pl.ops.gating import Gating, gates_of
from moka_pl.ops.layout import Shape
from moka_pl.ops.rows import stack_factors

#: Bytes of packed factors that are put side by side at once: what is needed meanwhile is several times that.
_CHUNK = 2**28

#: Bytes of the factors of a batch's rows that are gathered for several layers at once, at most.
_GATHERED = 2**29


class RowFactors:
    """The factors of a batch's rows, gathered once for all layers whose adapters have the same shapes.

    Attributes:
        factors: Those of the adapters of all layers, layer by layer, shape (L K, entries), while a batch is
            computed; None where layers have others' adapters, and so other rows.
    """

    def __init__(self) -> None:
        self.factors: Tensor | None = None
        self._known: dict[tuple[torch.dtype, int], tuple[Tensor, tuple[Tensor, ...]]] = {}

    def of(self, number: int, count: int, adapter: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Returns the factors of a layer's rows, (N, entries), or None where each layer does so by itself.

        Args:
            number: Which of the layers it is.
            count: K, its adapters.
            adapter: Which of them each row has, shape (N,).
            dtype: Of the result.
        """
        if self.factors is None:
            return None
        layers, rows = len(self.factors) // count, len(adapter)
        if layers * rows * self.factors.shape[1] * dtype.itemsize > _GATHERED:
            return None
        key = dtype, id(adapter)
        if key not in self._known:
            first = torch.arange(0, len(self.factors), count, device=adapter.device)  # (L,)
            which = (first[:, None] + adapter).flatten()  # (L N,)
            factors = self.factors.to(dtype).index_select(0, which)  # (L N, entries)
            self._known[key] = adapter, torch.split(factors, rows)
        return self._known[key][1][number]

    def clear(self) -> None:
        """Drops what was gathered."""
        self.factors = None
        self._known.clear()


@dataclass(eq=False)
class Stack:
    """Adapters of the same shapes over one layer.

    Attributes:
        names: Their names.
        shapes: Their r shapes.
        shared: The factors of the rows of all layers that are stacked with this one.
        number: Which of them it is.
        factors: Their factors as :func:`moka_pl.ops.rows.stack_factors` makes them, shape (K, entries), while
            a batch is computed.
        packed: Their packed left and right factors, (K, entries), and the weights of their components,
            (K, r), likewise.
    """

    names: tuple[str, ...]
    shapes: tuple[Shape, ...]
    shared: RowFactors
    number: int
    factors: Tensor
    packed: tuple[Tensor, Tensor, Tensor]

    def of_rows(self, adapter: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the factors of a batch's rows, shape (N, entries).

        Args:
            adapter: Which of the adapters each row has, shape (N,).
            dtype: Of the result.
        """
        gathered = self.shared.of(self.number, len(self.names), adapter, dtype)
        return self.factors.to(dtype).index_select(0, adapter) if gathered is None else gathered


class _Kind(NamedTuple):
    """What adapted layers must have in common to be put side by side."""

    shapes: tuple[Shape, ...]
    m: int
    dtype: torch.dtype
    device: torch.device


#: Left factors, right factors and gate logits of an adapted layer.
_Tensors = tuple[Tensor | None, Tensor, Tensor | None]


class _Chunk(NamedTuple):
    """Adapted layers of one kind, layer after layer, and where their factors go.

    Attributes:
        kind: Their kind.
        members: The layers.
        tensors: Their tensors.
        stacks: The stack of each frozen layer.
        shared: What these have in common.
    """

    kind: _Kind
    members: list[MokaLayer]
    tensors: list[_Tensors]
    stacks: list[Stack]
    shared: RowFactors

    @property
    def even(self) -> bool:
        """Whether all frozen layers have the same adapters."""
        return len({stack.names for stack in self.stacks}) == 1


class LayerStacks:
    """The factors of each layer's adapters side by side.

    What goes where is found once, as that takes as long as a small batch. The factors are copied for each
    batch, as they may have been trained meanwhile, and take memory only as long.

    Args:
        layers: The adapted layers over each layer, by the layer's and the adapter's name.

    Attributes:
        of: The stacks of each layer by its name.
    """

    def __init__(self, layers: Mapping[str, Mapping[str, MokaLayer]]) -> None:
        kinds: dict[_Kind, dict[str, list[str]]] = {}
        for target, adapters in layers.items():
            for name, layer in adapters.items():
                kind = _Kind(layer.shapes, layer.out_features, layer.moka_B.dtype, layer.moka_B.device)
                kinds.setdefault(kind, {}).setdefault(target, []).append(name)
        self.of: dict[str, list[Stack]] = {target: [] for target in layers}
        self._chunks: list[_Chunk] = []
        for kind, targets in kinds.items():
            nothing = torch.empty(0, device=kind.device)
            for chunk in _chunks(targets, layers):
                members = [layers[target][name] for target in chunk for name in targets[target]]
                shared = RowFactors()
                stacks = [
                    Stack(tuple(targets[target]), kind.shapes, shared, number, nothing, (nothing,) * 3)
                    for number, target in enumerate(chunk)
                ]
                self._chunks.append(_Chunk(kind, members, list(map(_tensors, members)), stacks, shared))
                for target, stack in zip(chunk, stacks, strict=True):
                    self.of[target].append(stack)

    @property
    def current(self) -> bool:
        """Whether the layers have the same tensors still: a state dict may have brought others."""
        return all(
            a is b
            for chunk in self._chunks
            for layer, known in zip(chunk.members, chunk.tensors, strict=True)
            for a, b in zip(_tensors(layer), known, strict=True)
        )

    @torch.no_grad()
    def fill(self) -> None:
        """Copies the factors."""
        for chunk in self._chunks:
            sizes = [len(stack.names) for stack in chunk.stacks]
            stacked = _stack(chunk)
            chunk.shared.clear()
            chunk.shared.factors = stacked[0] if chunk.even else None
            parts = (torch.split(part, sizes) for part in stacked)
            for stack, factors, *packed in zip(chunk.stacks, *parts, strict=True):
                left, right, weights = packed
                stack.factors, stack.packed = factors, (left, right, weights)

    def clear(self) -> None:
        """Drops the copies."""
        for chunk in self._chunks:
            chunk.shared.clear()
            for stack in chunk.stacks:
                nothing = stack.factors.new_empty(0)
                stack.factors, stack.packed = nothing, (nothing,) * 3


def _chunks(
    targets: Mapping[str, list[str]], layers: Mapping[str, Mapping[str, MokaLayer]]
) -> Iterator[list[str]]:
    """Splits layers into lists whose adapters' factors are small enough."""
    target, names = next(iter(targets.items()))
    left, right, _ = _tensors(layers[target][names[0]])
    one = 4 * (right.numel() + (0 if left is None else left.numel()))
    count = max(_CHUNK // (one * max(map(len, targets.values()))), 1)
    listed = list(targets)
    for start in range(0, len(listed), count):
        yield listed[start : start + count]


def _tensors(layer: MokaLayer) -> _Tensors:
    """Returns the tensors of an adapted layer."""
    return layer.moka_A, layer.moka_B, layer.moka_gate


def _stack(chunk: _Chunk) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns :attr:`Stack.factors` and :attr:`Stack.packed` of all layers, in single precision at least."""
    lefts, rights, gates = zip(*chunk.tensors, strict=True)
    wide = torch.promote_types(chunk.kind.dtype, torch.float32)
    right = torch.stack(rights).to(wide)
    left = right.new_empty(len(right), 0) if lefts[0] is None else torch.stack(lefts).to(wide)
    weights = _weights(chunk.members, gates, right)
    factors = stack_factors(left, right, weights, chunk.kind.shapes, chunk.kind.m)
    return factors, left, right, weights


def _weights(members: Sequence[MokaLayer], logits: Sequence[Tensor | None], like: Tensor) -> Tensor:
    """Returns gates times scaling, shape (K, r), of the dtype and on the device of ``like``.

    Args:
        members: K adapted layers of one kind.
        logits: The gate logits of each.
        like: Any tensor.
    """
    r = len(members[0].shapes)
    alpha = like.new_full((len(members), r), 1 / r)  # (K, r)
    kinds: dict[Gating, list[int]] = {}
    for i, layer in enumerate(members):
        if logits[i] is not None:
            kinds.setdefault(layer.gating, []).append(i)
    for gating, which in kinds.items():
        own = torch.stack([gate for i in which if (gate := logits[i]) is not None])
        gates = gates_of(own.to(like), gating)
        every = len(which) == len(members)
        alpha = gates if every else alpha.index_copy(0, torch.tensor(which, device=like.device), gates)
    scalings = [layer.scaling for layer in members]
    if len(set(scalings)) == 1:
        return alpha * scalings[0]
    return alpha * torch.tensor(scalings, dtype=like.dtype, device=like.device)[:, None]
