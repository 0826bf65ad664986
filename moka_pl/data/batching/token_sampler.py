"""Batches of similar lengths that hold as many examples as fit into a number of tokens."""

from collections.abc import Sequence

import numpy

from moka_pl.data.batching.samplers import GlobalBatchSampler, Indices


class TokenSampler(GlobalBatchSampler):
    """Shuffled batches of examples of similar length, as many as their padded tokens allow.

    Examples are sorted by padded length, equal ones shuffled, and cut into batches; the batches are shuffled.
    Where the cuts are depends on the lengths alone, so that every epoch has the same number of batches, which
    the learning-rate schedule needs to know beforehand.

    Args:
        lengths: Length of every example (tokens).
        max_tokens: Most tokens of a batch per rank, padding included.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        seed: Seed of the shuffling, 0 or above.
        multiple: Batches are padded to a multiple of this many tokens.

    Raises:
        ValueError: If an example is longer than a batch may be.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        multiple: int = 1,
    ) -> None:
        super().__init__(lengths, 1, num_replicas, rank, seed)
        self._widths = -(-self.lengths // multiple) * multiple
        descending = numpy.sort(self._widths)[::-1]
        if len(descending) and descending[0] > max_tokens:
            raise ValueError(
                f"max_tokens must be at least the longest example, {descending[0]}, got {max_tokens}."
            )
        self._cuts: list[int] = []
        start = 0
        while start < len(descending):
            self._cuts.append(start)
            start += num_replicas * (max_tokens // int(descending[start]))

    def __len__(self) -> int:
        """Number of batches of an epoch, for every rank and in every epoch."""
        return len(self._cuts)

    def global_batches(self) -> list[Indices]:
        """All global batches of the current epoch, the same on every rank."""
        random = numpy.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        order = order[numpy.argsort(-self._widths[order], kind="stable")]
        batches = numpy.split(order, self._cuts[1:])
        return [batches[number] for number in random.permutation(len(batches))]
