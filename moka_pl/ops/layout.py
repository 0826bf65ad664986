"""The sizes of one Kronecker component."""

from collections.abc import Sequence
from typing import NamedTuple


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

    def __str__(self) -> str:
        left = f"I{self.m_a}" if self.identity else f"{self.m_a}×{self.n_a}"
        return f"{left} ⊗ {self.m_b}×{self.n_b}"


def group_equal(shapes: Sequence[Shape]) -> dict[Shape, list[int]]:
    """Numbers of the components of each shape: they share matrix products."""
    groups: dict[Shape, list[int]] = {}
    for i, shape in enumerate(shapes):
        groups.setdefault(shape, []).append(i)
    return groups
