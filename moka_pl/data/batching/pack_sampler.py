"""Packed batches: rows that hold several examples."""

import math
from collections.abc import Sequence
from typing import Any

import numpy

from moka_pl.data.batching.packs import best_fit_decreasing
from moka_pl.data.batching.samplers import GlobalBatchSampler, Indices, filler

Pack = list[int]
"""Indices of the examples of a row."""


class PackSampler(GlobalBatchSampler):
    """Shuffled batches of packed rows; it yields lists of packs, each a list of indices.

    All examples are packed together, best fit first, and the packs are shuffled. The lengths in each pack
    depend on the data alone, so that every epoch has the same number of batches, which the learning-rate
    schedule needs to know beforehand. Which of the examples of one length stands in which pack is drawn anew
    in every epoch.

    Args:
        lengths: Length of every example (tokens).
        batch_size: Packs per rank and batch.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        seed: Seed of the shuffling, 0 or above.
        capacity: Most tokens of a pack.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        *,
        capacity: int,
    ) -> None:
        super().__init__(lengths, batch_size, num_replicas, rank, seed)
        descending = numpy.sort(self.lengths)[::-1]
        self._packs = best_fit_decreasing(descending.tolist(), capacity)

    def __len__(self) -> int:
        """Number of batches of an epoch, for every rank and in every epoch."""
        return math.ceil(len(self._packs) / self.global_size)

    def global_batches(self) -> list[list[Pack]]:
        """All global batches of the current epoch, the same on every rank."""
        random = numpy.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        # Shuffled among equals, each index stands where its length was packed.
        order = order[numpy.argsort(-self.lengths[order], kind="stable")]
        packs: list[Pack] = [
            order[self._packs[number]].tolist() for number in random.permutation(len(self._packs))
        ]
        return [packs[start : start + self.global_size] for start in range(0, len(packs), self.global_size)]

    def row_lengths(self, batch: Sequence[Any] | Indices) -> list[int]:
        """Tokens of every pack of a global batch."""
        return [int(self.lengths[pack].sum()) for pack in batch]

    def _fill(self, batch: Any) -> Pack:
        indices = [index for pack in batch for index in pack]
        return [filler(min(indices, key=lambda index: int(self.lengths[index])))]
