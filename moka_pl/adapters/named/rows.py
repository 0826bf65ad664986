"""A frozen layer under rows of a batch that have adapters of their own."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.layer import MokaLayer
from moka_pl.adapters.vocabulary.embedding import MokaEmbedding
from moka_pl.errors import AdapterError
from moka_pl.ops.gating import gates_of
from moka_pl.ops.kronecker import kronecker_linear
from moka_pl.ops.layout import Shape
from moka_pl.ops.rows import RowFactors, rows_update, stack_factors

#: Tokens of a row from which on each adapter's rows are computed by themselves: then its own backend is
#: faster than batched products with small factors.
_MANY_TOKENS = 16


class Rows:
    """The rows of a batch, by adapter: the same for all layers, and so made once.

    Args:
        names: The adapter's name of each row.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.count = len(names)
        self._of = {name: [i for i, row in enumerate(names) if row == name] for name in dict.fromkeys(names)}
        self._known: dict[tuple[tuple[str, ...], torch.device], tuple[Tensor, Tensor]] = {}

    def used(self, adapters: Mapping[str, MokaLayer]) -> list[str]:
        """Returns the names of those adapters that rows have."""
        return [name for name in self._of if name in adapters]

    def of(self, names: tuple[str, ...], device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the rows that some adapters have, ascending, and which of the adapters each has.

        Args:
            names: The adapters.
            device: Where the two lie, of shape (I,).
        """
        if (names, device) not in self._known:
            pairs = sorted((row, k) for k, name in enumerate(names) for row in self._of[name])
            rows, adapter = torch.tensor(pairs, device=device).unbind(1)  # (I,)
            self._known[names, device] = rows, adapter
        return self._known[names, device]


class RowLayer(nn.Module):
    """A frozen layer, the rows of a batch, and the adapted layers over it that these have.

    Args:
        name: The layer's full name, for messages.
        base_layer: The frozen layer.
        adapters: The adapted layers over it, by adapter; rows of other names get the frozen layer alone.
        rows: The rows of the batch.
    """

    base_layer: Any

    def __init__(
        self, name: str, base_layer: nn.Module, adapters: Mapping[str, MokaLayer], rows: Rows
    ) -> None:
        super().__init__()
        self.name = name
        self.base_layer = base_layer
        self.rows = rows.count
        self.of_one = [(adapters[k], rows.of((k,), self.weight.device)[0]) for k in rows.used(adapters)]

    @property
    def weight(self) -> Tensor:
        """The frozen weight W: its dtype and device are what models ask for."""
        weight: Tensor = self.base_layer.weight
        return weight


class RowLinear(RowLayer):
    """``y = W x + ΔW_k x`` where k is the adapter of the row that x lies in (see :class:`RowLayer`).

    ``W x`` is computed once for all rows, each update for its own rows only. For few tokens a row, as in
    generating, adapters of the same shapes are computed together.
    """

    base_layer: nn.Linear

    def __init__(
        self, name: str, base_layer: nn.Linear, adapters: Mapping[str, MokaLayer], rows: Rows
    ) -> None:
        super().__init__(name, base_layer, adapters, rows)
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        alike: dict[tuple[tuple[Shape, ...], torch.dtype], list[str]] = {}
        for k in rows.used(adapters):
            alike.setdefault((adapters[k].shapes, adapters[k].moka_B.dtype), []).append(k)
        device = self.weight.device
        self.together = [
            (_stack([adapters[k] for k in members], device), *rows.of(tuple(members), device))
            for members in alike.values()
        ]

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias, if there is one."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Maps x of shape (N, ..., n) to (N, ..., m); N may be a multiple of the rows, as with beams.

        Raises:
            AdapterError: If x has no rows, or a number of them that is no such multiple.
        """
        out: Tensor = self.base_layer(x)  # (N, ..., m)
        times = _times(self.name, x, self.rows, 3)
        if not self.of_one:
            return out
        flat = x.reshape(len(x), -1, self.in_features)  # (N, T, n)
        update = out.new_zeros(*flat.shape[:2], self.out_features)  # (N, T, m)
        if flat.shape[1] < _MANY_TOKENS:
            for stacked, rows, adapter in self.together:
                if len(rows) == self.rows:
                    update += rows_update(flat, stacked, _repeated(adapter, times), self.out_features)
                    continue
                chosen = _expanded(rows, times)
                part = rows_update(flat[chosen], stacked, _repeated(adapter, times), self.out_features)
                update[chosen] = part.to(update.dtype)
        else:
            for layer, rows in self.of_one:
                chosen = _expanded(rows, times)
                update[chosen] = _alone(layer, flat[chosen]).to(update.dtype)
        return out + update.view_as(out)


class RowEmbedding(RowLayer):
    """``y = W[t] + ΔW_k[t]`` where k is the adapter of the row of token t (see :class:`RowLayer`)."""

    def forward(self, ids: Tensor) -> Tensor:
        """Maps tokens, (N, T), to (N, T, d); N may be a multiple of the rows, as with beams.

        Raises:
            AdapterError: If there are no rows, or a number of them that is no such multiple.
        """
        times = _times(self.name, ids, self.rows, 2)
        out: Tensor = self.base_layer(ids)  # (N, T, d)
        for layer, rows in self.of_one:
            assert isinstance(layer, MokaEmbedding)
            chosen = _expanded(rows, times)
            out = out.index_add(0, chosen, layer.update(ids[chosen]).to(out))
        return out


def _times(name: str, x: Tensor, rows: int, dims: int) -> int:
    """Returns how often each row stands in a batch; refuses other numbers of rows."""
    times, rest = divmod(len(x), rows)
    if x.dim() < dims or rest:
        raise AdapterError(
            f"{name} is given {' × '.join(map(str, x.shape))} numbers, but adapter_names has "
            f"{rows} rows; give one name for each row of the batch"
        )
    return times


def _stack(members: list[MokaLayer], device: torch.device) -> list[RowFactors]:
    """Returns the factors of adapters of the same shapes."""
    logits: list[Tensor] = [layer.moka_gate for layer in members if layer.moka_gate is not None]
    kinds = {layer.gating for layer in members}
    if len(kinds) == 1 and len(logits) == len(members):  # all at once: calls take the time, not numbers
        scaling = torch.tensor([[layer.scaling] for layer in members], dtype=logits[0].dtype, device=device)
        weights = gates_of(torch.stack(logits).to(device), kinds.pop()) * scaling  # (K, r)
    else:
        weights = torch.stack([layer.gates() * layer.scaling for layer in members]).to(device)  # (K, r)
    left, right = (torch.stack(part).to(device) for part in zip(*map(_factors, members), strict=True))
    return stack_factors(left, right, weights, members[0].shapes)


def _factors(layer: MokaLayer) -> tuple[Tensor, Tensor]:
    """Returns packed left and right factors."""
    return layer.moka_B.new_empty(0) if layer.moka_A is None else layer.moka_A, layer.moka_B


def _alone(layer: MokaLayer, x: Tensor) -> Tensor:
    """Returns the update of one adapter's rows, (N, T, m)."""
    weights = layer.gates() * layer.scaling
    left, right, weights = (part.to(x.device) for part in (*_factors(layer), weights))
    return kronecker_linear(x, weights, left, right, layer.shapes, layer.out_features, layer.backend)


def _repeated(adapter: Tensor, times: int) -> Tensor:
    """The adapter of each row of a batch in which every row stands ``times`` times."""
    return adapter if times == 1 else adapter.repeat_interleave(times)


def _expanded(rows: Tensor, times: int) -> Tensor:
    """Where these rows are in such a batch."""
    if times == 1:
        return rows
    return (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()
