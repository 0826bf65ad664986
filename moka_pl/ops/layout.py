"""Sizes of Kronecker components, and the packing of a layer's factors.

All left factors lie in one flat vector and all right ones in a second: few large parameters instead of
twenty small ones. A step then costs few optimizer, autograd and launch calls, which is what bounds small
models on a GPU.
"""

from collections.abc import Sequence
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor


class Shape(NamedTuple):
    """Sizes of one component: ``A`` is m_a × n_a, ``B`` is m_b × n_b; ``identity`` fixes A = I."""

    m_a: int
    n_a: int
    m_b: int
    n_b: int
    identity: bool = False

    @property
    def rows(self) -> int:
        """Rows of A ⊗ B."""
        return self.m_a * self.m_b

    @property
    def cols(self) -> int:
        """Columns of A ⊗ B."""
        return self.n_a * self.n_b

    @property
    def num_parameters(self) -> int:
        """Trainable entries of both factors."""
        return self.m_b * self.n_b + (0 if self.identity else self.m_a * self.n_a)

    @property
    def rank(self) -> int:
        """Largest rank of A ⊗ B, which is reached unless a factor has lost rank of its own."""
        return min(self.m_a, self.n_a) * min(self.m_b, self.n_b)

    @property
    def costs(self) -> tuple[int, int]:
        """Multiply-adds for a token of (A X) Bᵀ, the left factor first, and of A (X Bᵀ)."""
        left = self.m_a * self.n_b * (self.n_a + self.m_b)
        return left, self.n_a * self.m_b * (self.n_b + self.m_a)

    def __str__(self) -> str:
        left = f"I{self.m_a}" if self.identity else f"{self.m_a}×{self.n_a}"
        return f"{left} ⊗ {self.m_b}×{self.n_b}"


def exact_rank(shapes: Sequence[Shape], m: int, n: int) -> int:
    """Returns the rank of the LoRA that a sum of components, cut to m × n, is exactly.

    Args:
        shapes: The components' shapes.
        m: Output features.
        n: Input features.
    """
    return min(sum(shape.rank for shape in shapes), m, n)


def group_equal(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Indices of the components of each shape, which share matrix products."""
    groups: dict[Shape, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(i)
    return groups


#: r pairs (A_i or None for an identity, B_i).
Pairs = list[tuple[Tensor | None, Tensor]]


@cache
def left_sizes(shapes: tuple[Shape, ...]) -> list[int]:
    """Entries of every left factor; none for an identity."""
    return [0 if s.identity else s.m_a * s.n_a for s in shapes]


@cache
def right_sizes(shapes: tuple[Shape, ...]) -> list[int]:
    """Entries of every right factor."""
    return [s.m_b * s.n_b for s in shapes]


def starts(sizes: Sequence[int]) -> list[int]:
    """Where each stretch begins in a vector of stretches of these sizes."""
    return list(accumulate(sizes, initial=0))[:-1]


def pack(factors: Sequence[tuple[Tensor | None, Tensor]]) -> tuple[Tensor, Tensor]:
    """Packs r pairs (A_i or None, B_i) into the vectors of left and of right factors."""
    right = torch.cat([b.reshape(-1) for _, b in factors])
    left = [a.reshape(-1) for a, _ in factors if a is not None]
    return torch.cat(left) if left else right.new_empty(0), right


def unpack(left: Tensor | None, right: Tensor, shapes: tuple[Shape, ...]) -> Pairs:
    """Views packed factors as r pairs (A_i of (m_a, n_a) or None, B_i of (m_b, n_b)).

    Args:
        left: Packed left factors; None if all are identities.
        right: Packed right factors.
        shapes: r shapes.
    """
    rights = torch.split(right, right_sizes(shapes))
    lefts = rights if left is None else torch.split(left, left_sizes(shapes))
    return [
        (None if s.identity else a.view(s.m_a, s.n_a), b.view(s.m_b, s.n_b))
        for a, b, s in zip(lefts, rights, shapes, strict=True)
    ]


class ComponentIndex(NamedTuple):
    """The component of each entry of a packed vector.

    Attributes:
        size: Entries of every component, where all have equally many; else 0.
        component: Component of every entry.
    """

    size: int
    component: Tensor

    @classmethod
    def of_sizes(cls, sizes: Sequence[int], device: torch.device) -> "ComponentIndex":
        """For components of so many entries, one after another."""
        component = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)
        return cls(sizes[0] if len(set(sizes)) == 1 else 0, component)

    def scale(self, packed: Tensor, weights: Tensor) -> Tensor:
        """Multiplies each packed entry by its component's weight; weights have shape (r,)."""
        if self.size:
            return (packed.view(-1, self.size) * weights[:, None]).view(-1)
        return packed * weights[self.component]

    def sums(self, packed: Tensor, components: int) -> Tensor:
        """Sums the packed entries of each component, shape (r,)."""
        if self.size:
            return packed.view(-1, self.size).sum(1)
        return packed.new_zeros(components).index_add_(0, self.component, packed)
