"""Which rows of a batch have which adapter."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from moka_pl.adapters.layer import MokaLayer


class Rows:
    """The rows of a batch, by adapter: the same for all layers, and so made once.

    Args:
        names: The adapter's name of each row.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.count = len(names)
        self._of = {name: [i for i, row in enumerate(names) if row == name] for name in dict.fromkeys(names)}
        self._known: dict[tuple[tuple[str, ...], torch.device, int], tuple[Tensor, Tensor]] = {}
        self._ordered: dict[tuple[tuple[str, ...], torch.device, int], tuple[Tensor, Tensor]] = {}

    def used(self, adapters: Mapping[str, MokaLayer]) -> tuple[str, ...]:
        """Returns the names of those adapters that rows have."""
        return tuple(name for name in self._of if name in adapters)

    def of(self, names: tuple[str, ...], device: torch.device, times: int = 1) -> tuple[Tensor, Tensor]:
        """Returns the rows that some adapters have, ascending, and which of the adapters each has.

        Args:
            names: The adapters.
            device: Where the two lie, of shape (I,).
            times: How often each row stands in the batch, one copy after another.
        """
        key = names, device, times
        if key not in self._known:
            pairs = sorted((row, k) for k, name in enumerate(names) for row in self._of[name])
            pairs = [(row * times + copy, k) for row, k in pairs for copy in range(times)]
            with torch.inference_mode(False):  # what an evaluation makes first serves others, too
                table = torch.tensor(pairs, dtype=torch.long).view(-1, 2).mT.contiguous().to(device)
            self._known[key] = table[0], table[1]  # (I,), (I,)
        return self._known[key]

    def others(self, names: tuple[str, ...], device: torch.device, times: int = 1) -> Tensor:
        """Returns the rows that have none of some adapters, ascending, shape (I,).

        Args:
            names: The adapters.
            device: Where the result lies.
            times: How often each row stands in the batch, one copy after another.
        """
        return self.of(tuple(name for name in self._of if name not in names), device, times)[0]

    def is_even(self, names: tuple[str, ...]) -> bool:
        """Whether some adapters have so equally many rows that filling up to the most costs little."""
        counts = [len(self._of[name]) for name in names]
        return len(counts) * max(counts) <= 1.25 * sum(counts)

    def by_adapter(
        self, names: tuple[str, ...], device: torch.device, times: int = 1
    ) -> tuple[Tensor, Tensor]:
        """Returns where the rows of some adapters are, adapter by adapter, and how to put them back.

        Each adapter has R places, as many as the most of them have rows; some row stands in those left over.

        Args:
            names: K adapters.
            device: Where the results lie: of shape (K R,), and of (I,) for the rows of :meth:`of`.
            times: How often each row stands in the batch, one copy after another.
        """
        key = names, device, times
        if key not in self._ordered:
            lists = [
                [row * times + copy for row in self._of[name] for copy in range(times)] for name in names
            ]
            most = max(map(len, lists))
            order = [row for rows in lists for row in rows + rows[:1] * (most - len(rows))]
            places = {row: k * most + i for k, rows in enumerate(lists) for i, row in enumerate(rows)}
            with torch.inference_mode(False):
                back = torch.tensor([places[row] for row in sorted(places)]).to(device)
                self._ordered[key] = torch.tensor(order).to(device), back
        return self._ordered[key]
