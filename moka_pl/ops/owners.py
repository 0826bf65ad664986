"""Which component each entry of a packed vector belongs to."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Owners(NamedTuple):
    """The component that each entry of a packed vector belongs to.

    Attributes:
        size: Entries of every component, where all have equally many; else 0.
        of: Component of every entry.
    """

    size: int
    of: Tensor

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device) -> "Owners":
        """For components of so many entries, one after another."""
        of = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
        return cls(sizes[0] if len(set(sizes)) == 1 else 0, of)

    def scale(self, packed: Tensor, weights: Tensor) -> Tensor:
        """Multiplies each entry by its component's weight."""
        if self.size:
            return (packed.view(-1, self.size) * weights[:, None]).view(-1)
        return packed * weights[self.of]

    def sums(self, packed: Tensor, components: int) -> Tensor:
        """Sums the entries of each component, (r,)."""
        if self.size:
            return packed.view(-1, self.size).sum(1)
        return packed.new_zeros(components).index_add_(0, self.of, packed)
