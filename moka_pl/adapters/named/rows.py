"""A frozen layer under rows of a batch that have adapters of their own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moka_pl.adapters.layer import MokaLinear
from moka_pl.errors import AdapterError
from moka_pl.ops.kronecker import kronecker_linear
from moka_pl.ops.layout import Shape
from moka_pl.ops.rows import RowFactors, rows_update, stack_factors

#: Tokens of a row from which on each adapter's rows are computed by themselves: then its own backend is
#: faster than batched products with small factors.
_MANY_TOKENS = 16


class RowLinear(nn.Module):
    """``y = W x + ΔW_k x`` where k is the adapter of the row that x lies in.

    ``W x`` is computed once for all rows, each update for its own rows only. For few tokens a row, as in
    generating, adapters of the same shapes are computed together.

    Args:
        name: The layer's full name, for messages.
        base_layer: The frozen layer.
        adapters: The adapted layers over it, by adapter; rows of other names get the frozen layer alone.
        rows: The adapter's name of each row.
    """

    def __init__(
        self, name: str, base_layer: nn.Linear, adapters: Mapping[str, MokaLinear], rows: Sequence[str]
    ) -> None:
        super().__init__()
        self.name = name
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.rows = len(rows)
        device = base_layer.weight.device
        self.of_one = {
            adapters[k]: torch.tensor([i for i, row in enumerate(rows) if row == k], device=device)
            for k in dict.fromkeys(rows)
            if k in adapters
        }
        alike: dict[tuple[tuple[Shape, ...], torch.dtype], list[MokaLinear]] = {}
        for layer in self.of_one:
            alike.setdefault((layer.shapes, layer.moka_B.dtype), []).append(layer)
        self.together = [_stack(members, [self.of_one[m] for m in members]) for members in alike.values()]

    @property
    def weight(self) -> Tensor:
        """The frozen weight W: its dtype and device are what models ask for."""
        return self.base_layer.weight

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
        times, rest = divmod(len(x), self.rows)
        if x.dim() < 3 or rest:
            raise AdapterError(
                f"{self.name} is given {' × '.join(map(str, x.shape))} numbers, but adapter_names has "
                f"{self.rows} rows; give one name for each row of the batch"
            )
        if not self.of_one:
            return out
        flat = x.reshape(len(x), -1, self.in_features)  # (N, T, n)
        update = out.new_zeros(*flat.shape[:2], self.out_features)  # (N, T, m)
        if flat.shape[1] < _MANY_TOKENS:
            for stacked, adapter, rows in self.together:
                if len(rows) == self.rows:
                    update += rows_update(flat, stacked, _repeated(adapter, times), self.out_features)
                    continue
                chosen = _expanded(rows, times)
                part = rows_update(flat[chosen], stacked, _repeated(adapter, times), self.out_features)
                update[chosen] = part.to(update.dtype)
        else:
            for layer, rows in self.of_one.items():
                chosen = _expanded(rows, times)
                update[chosen] = _alone(layer, flat[chosen]).to(update.dtype)
        return out + update.view_as(out)


def _stack(members: list[MokaLinear], rows: list[Tensor]) -> tuple[list[RowFactors], Tensor, Tensor]:
    """Returns the factors of adapters of the same shapes, the adapter of each of their rows, and the rows."""
    parts = zip(*map(_factors, members), strict=True)
    left, right, weights = (torch.stack(part).to(rows[0].device) for part in parts)
    counts = torch.tensor([len(r) for r in rows], device=rows[0].device)
    adapter = torch.arange(len(members), device=counts.device).repeat_interleave(counts)
    every = torch.cat(rows)
    order = every.argsort()
    return stack_factors(left, right, weights, members[0].shapes), adapter[order], every[order]


def _factors(layer: MokaLinear) -> tuple[Tensor, Tensor, Tensor]:
    """Returns packed left and right factors and the weights of the components, (r,)."""
    left = layer.moka_B.new_empty(0) if layer.moka_A is None else layer.moka_A
    return left, layer.moka_B, layer.gates() * layer.scaling


def _alone(layer: MokaLinear, x: Tensor) -> Tensor:
    """Returns the update of one adapter's rows, (N, T, m)."""
    left, right, weights = (part.to(x.device) for part in _factors(layer))
    return kronecker_linear(x, weights, left, right, layer.shapes, layer.out_features, layer.backend)


def _repeated(adapter: Tensor, times: int) -> Tensor:
    """The adapter of each row of a batch in which every row stands ``times`` times."""
    return adapter if times == 1 else adapter.repeat_interleave(times)


def _expanded(rows: Tensor, times: int) -> Tensor:
    """Where these rows are in such a batch."""
    if times == 1:
        return rows
    return (rows[:, None] * times + torch.arange(times, device=rows.device)).flatten()
