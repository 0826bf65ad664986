"""Which examples stand in which batch, the same whatever the number of ranks.

The samplers subclass `DistributedSampler`, so that Lightning neither replaces nor wraps them and tells them
the epoch, but they yield whole batches: lists of indices. A `DataLoader(batch_size=None, sampler=...)` hands
such a list to the data set's `__getitem__`.
"""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

MEGA = 50
"""Global batches per mega-batch: examples are sorted by length inside one, and shuffled between them."""

Indices = NDArray[numpy.int64]


def filler(index: int) -> int:
    """The index that stands for row `index` with all of its labels masked; its own inverse."""
    return -1 - index


class GlobalBatchSampler(DistributedSampler[list[Any]]):
    """Forms global batches and yields this rank's share of each.

    A global batch holds `batch_size * num_replicas` examples; rank r takes elements r, r + num_replicas, ...
    of it. Shares of the last, incomplete batch are filled up with `filler` indices, so that all ranks yield
    equally many batches of equal sizes and no example counts twice.

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
            raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
        self.lengths = numpy.asarray(lengths, dtype=numpy.int64)
        self.batch_size = batch_size
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
        """Number of batches of an epoch, for every rank."""
        return math.ceil(len(self.lengths) / self.global_size)

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

    def _cut(self, order: Indices) -> list[Indices]:
        return [order[start : start + self.global_size] for start in range(0, len(order), self.global_size)]


class TrainSampler(GlobalBatchSampler):
    """Shuffled batches; every epoch has its own order, which depends on seed, epoch and lengths only.

    Args:
        *args: As for `GlobalBatchSampler`.
        bucket: Put examples of similar length together: the shuffled examples are cut into mega-batches of 50
            global batches, each of these is sorted by length and cut into global batches, and the order of
            all global batches is shuffled.
        **kwargs: As for `GlobalBatchSampler`.
    """

    def __init__(self, *args: Any, bucket: bool = True, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.bucket = bucket

    def global_batches(self) -> list[Indices]:
        """All global batches of the current epoch, the same on every rank."""
        random = numpy.random.default_rng([self.seed, self.epoch])
        order = random.permutation(len(self.lengths))
        if not self.bucket:
            return self._cut(order)
        size = MEGA * self.global_size
        batches: list[Indices] = []
        for start in range(0, len(order), size):
            mega = order[start : start + size]
            batches += self._cut(mega[numpy.argsort(self.lengths[mega], kind="stable")])
        return [batches[index] for index in random.permutation(len(batches))]


class EvalSampler(GlobalBatchSampler):
    """Every example once, the largest first: what does not fit into memory shows at once.

    Args:
        *args: As for `GlobalBatchSampler`.
        slots: Tokens an example takes in a batch, where that is more than its length (the padded rows of a
            multiple-choice item). Batches hold examples of similar length, and those with most slots come
            first.
        **kwargs: As for `GlobalBatchSampler`.
    """

    def __init__(self, *args: Any, slots: Sequence[int] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.slots = self.lengths if slots is None else numpy.asarray(slots, dtype=numpy.int64)

    def global_batches(self) -> list[Indices]:
        """All global batches, the same on every rank and in every epoch."""
        batches = self._cut(numpy.argsort(-self.lengths, kind="stable"))
        full = len(self.lengths) // self.global_size
        largest_first = sorted(batches[:full], key=lambda batch: -int(self.slots[batch].sum()))
        return largest_first + batches[full:]
