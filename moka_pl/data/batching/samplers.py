"""Assigns examples to batches, independently of the number of ranks.

The samplers subclass ``DistributedSampler``, so that Lightning neither replaces nor wraps them and tells them
the epoch, but they yield whole batches: lists of indices. A ``DataLoader(batch_size=None, sampler=...)``
hands such a list to the dataset's ``__getitem__``.
"""

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

MEGA = 50
"""Global batches per mega-batch; examples are sorted by length within a mega-batch."""

Indices = NDArray[numpy.int64]


def filler(index: int) -> int:
    """The index that stands for row ``index`` with all of its labels masked; its own inverse."""
    return -1 - index


class GlobalBatchSampler(DistributedSampler[list[Any]]):
    """Forms global batches and yields this rank's share of each.

    A global batch holds ``batch_size * num_replicas`` examples; rank r takes elements r, r + num_replicas,
    ... of it. Shares of the last, incomplete batch are filled up with ``filler`` indices, so that all ranks
    yield equally many batches of equal sizes and no example counts twice.

    Args:
        lengths: Length of every example (tokens).
        batch_size: Examples per rank and batch.
        num_replicas: Number of ranks.
        rank: This rank, from 0.
        seed: Seed of the shuffling, 0 or above.

    Attributes:
        skip: Batches to leave out at the start of the next iteration; it is used once.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, num_replicas: int = 1, rank: int = 0, seed: int = 0
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.lengths = numpy.asarray(lengths, dtype=numpy.int64)
        self.batch_size = batch_size
        self.num_batches = math.ceil(len(lengths) / (batch_size * num_replicas))
        self.skip = 0
        super().__init__(self.lengths, num_replicas, rank, shuffle=False, seed=seed)  # type: ignore[arg-type]

    @property
    def global_size(self) -> int:
        """Examples of a global batch, all ranks together."""
        return self.batch_size * self.num_replicas

    @abstractmethod
    def global_batches(self) -> Sequence[Sequence[Any] | Indices]:
        """All global batches of the current epoch, the same on every rank."""

    def row_lengths(self, batch: Sequence[Any] | Indices) -> list[int]:
        """Tokens of every row of a global batch, without padding."""
        lengths: list[int] = self.lengths[batch].tolist()
        return lengths

    def __len__(self) -> int:
        """Number of batches of an epoch, for every rank and in every epoch."""
        return self.num_batches

    def __iter__(self) -> Iterator[list[Any]]:
        skip, self.skip = self.skip, 0
        for batch in self.global_batches()[skip:]:
            yield self._share(batch)

    def _share(self, batch: Sequence[Any] | Indices) -> list[Any]:
        share = batch[self.rank :: self.num_replicas]
        rows: list[Any] = share.tolist() if isinstance(share, numpy.ndarray) else list(share)
        if len(rows) < math.ceil(len(batch) / self.num_replicas):
            rows.append(self._fill(batch))
        return rows

    def _fill(self, batch: Any) -> Any:
        """A row that fills a share of this global batch up: its shortest example, which costs the least."""
        return filler(int(batch[self.lengths[batch].argmin()]))

    def _shuffled(self) -> tuple[numpy.random.Generator, Indices]:
        """The generator of this epoch, and all examples in its order."""
        random = numpy.random.default_rng([self.seed, self.epoch])
        return random, random.permutation(len(self.lengths))

    def _cut(self, order: Any) -> list[Any]:
        return [order[start : start + self.global_size] for start in range(0, len(order), self.global_size)]


class TrainSampler(GlobalBatchSampler):
    """Shuffled batches; every epoch has its own order, which depends on seed, epoch and lengths only.

    Args:
        *args: As for ``GlobalBatchSampler``.
        bucket: Put examples of similar length together: the shuffled examples are cut into mega-batches of 50
            global batches, each of these is sorted by length and cut into global batches, and the order of
            all global batches is shuffled.
        **kwargs: As for ``GlobalBatchSampler``.
    """

    def __init__(self, *args: Any, bucket: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bucket = bucket

    def global_batches(self) -> list[Indices]:
        """All global batches of the current epoch, the same on every rank."""
        random, order = self._shuffled()
        if not self.bucket:
            return self._cut(order)
        size = MEGA * self.global_size
        batches: list[Indices] = []
        for start in range(0, len(order), size):
            mega = order[start : start + size]
            batches += self._cut(mega[numpy.argsort(self.lengths[mega], kind="stable")])
        return [batches[index] for index in random.permutation(len(batches))]


class EvalSampler(GlobalBatchSampler):
    """Every example once, the largest first, so that running out of memory shows early.

    Args:
        *args: As for ``GlobalBatchSampler``.
        padded_tokens: Tokens an example takes in a batch, where that is more than its length (the padded rows
            of a multiple-choice item). Batches hold examples of similar length, and those with most padded
            tokens come first.
        **kwargs: As for ``GlobalBatchSampler``.
    """

    def __init__(self, *args: Any, padded_tokens: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        sizes = self.lengths if padded_tokens is None else padded_tokens
        self.padded_tokens = numpy.asarray(sizes, dtype=numpy.int64)

    def global_batches(self) -> list[Indices]:
        """All global batches, the same on every rank and in every epoch."""
        batches = self._cut(numpy.argsort(-self.lengths, kind="stable"))
        full = len(self.lengths) // self.global_size
        largest_first = sorted(batches[:full], key=lambda batch: -int(self.padded_tokens[batch].sum()))
        return largest_first + batches[full:]


class TokenSampler(GlobalBatchSampler):
    """Shuffled batches of examples of similar length, as many as their padded tokens allow.

    Examples are sorted by padded length, equal ones shuffled, and cut into batches; the batches are shuffled.
    Where the cuts are depends on the lengths alone, so that every epoch has the same number of batches, which
    the learning-rate schedule needs to know beforehand.

    Args:
        lengths: Length of every example (tokens).
        max_tokens: Most tokens of a batch per rank, padding included.
        *args: Ranks and seed as for ``GlobalBatchSampler``.
        multiple: Batches are padded to a multiple of this many tokens.
        **kwargs: The same.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *args: Any,
        multiple: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(lengths, 1, *args, **kwargs)
        self._widths = -(-self.lengths // multiple) * multiple
        descending = numpy.sort(self._widths)[::-1]
        if len(descending) and descending[0] > max_tokens:
            raise ValueError(
                f"max_tokens must be at least the longest example, {descending[0]}, got {max_tokens}"
            )
        self._cuts: list[int] = []
        start = 0
        while start < len(descending):
            self._cuts.append(start)
            start += self.num_replicas * (max_tokens // int(descending[start]))
        self.num_batches = len(self._cuts)

    def global_batches(self) -> list[Indices]:
        """All global batches of the current epoch, the same on every rank."""
        random, order = self._shuffled()
        order = order[numpy.argsort(-self._widths[order], kind="stable")]
        batches = numpy.split(order, self._cuts[1:])
        return [batches[number] for number in random.permutation(len(batches))]


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs lengths into rows: the longest first, each into the fullest row that still has room for it.

    How many rows there are, and which lengths stand in each, depends on how often each length occurs alone,
    not on the order of ``lengths``.

    Returns:
        Per row the indices into ``lengths``, the longest first.

    Raises:
        ValueError: A length is below 1 or above the capacity.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r: there is a row with room r
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"a length must be from 1 to {capacity}, got {length}")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows


Pack = list[int]
"""Indices of the examples of a row."""


class PackSampler(GlobalBatchSampler):
    """Shuffled batches of packed rows; it yields lists of packs, each a list of indices.

    All examples are packed together, best fit first, and the packs are shuffled. The lengths in each pack
    depend on the data alone, so that every epoch has the same number of batches, which the learning-rate
    schedule needs to know beforehand. Each epoch draws anew which examples of a length stand in which pack.

    Args:
        *args: As for ``GlobalBatchSampler``; the batch size counts packs.
        capacity: Most tokens of a pack.
        **kwargs: The same.
    """

    def __init__(self, *args: Any, capacity: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        descending = numpy.sort(self.lengths)[::-1]
        self._packs = best_fit_decreasing(descending.tolist(), capacity)
        self.num_batches = math.ceil(len(self._packs) / self.global_size)

    def global_batches(self) -> list[list[Pack]]:
        """All global batches of the current epoch, the same on every rank."""
        random, order = self._shuffled()
        # Shuffled among equals, each index stands where its length was packed.
        order = order[numpy.argsort(-self.lengths[order], kind="stable")]
        numbers = random.permutation(len(self._packs))
        return self._cut([order[self._packs[number]].tolist() for number in numbers])

    def row_lengths(self, batch: Sequence[Any] | Indices) -> list[int]:
        """Tokens of every pack of a global batch."""
        return [int(self.lengths[pack].sum()) for pack in batch]

    def _fill(self, batch: Any) -> Pack:
        return [super()._fill(numpy.concatenate(batch))]
