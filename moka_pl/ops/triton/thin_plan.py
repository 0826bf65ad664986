"""What the thin kernels know of a layer's components; made once for every layer size."""

from functools import cache
from typing import Any, NamedTuple

import torch

from moka_pl.ops.layout import Shape, left_sizes, right_sizes, starts
from moka_pl.ops.triton.plan import Plan, make_plan

#: The least hidden numbers of a token that a matrix product on a GPU takes.
NARROWEST = 16
#: Columns that one program fills of L and U, and packed entries of which one program adds up the gradient.
COLUMNS, CHUNK = 128, 32


class Tile(NamedTuple):
    """Tokens and columns of a tile, and how a program computes it."""

    tokens: int
    columns: int
    warps: int
    stages: int


class ThinPlan:
    """Sizes, tables and work lists of one layer's thin kernels.

    Args:
        shapes: r shapes without identities.
        m: Rows of the layer.
        n: Columns of the layer.
        device: Where the kernels run.

    Attributes:
        plan: What all kernels know of the layer.
        hidden: R, the hidden numbers of a token.
        padded: R, rounded up to a power of two.
        rows: For every hidden number where its row of A begins, n_a, n_b, q, a, where its column of B begins,
            m_b, and its component, (8, R).
        parts: For every component m_a, n_a, m_b, n_b, and where its hidden numbers, A and B begin, (r, 7).
        early: m_a and n_b where all shapes are one and these are powers of two, so that sums over a and q are
            taken early; else 1 and 1.
        work: Side (0 left, 1 right), component and first entry of every stretch of packed entries.
        left_size: Entries of all left factors.
        counts: For every component the first of its parts of ∂L/∂w in ``work``, and their number, (2, r).
        compiled: Kernels compiled for this plan.
    """

    def __init__(self, shapes: tuple[Shape, ...], m: int, n: int, device: torch.device) -> None:
        self.plan: Plan = make_plan(shapes, m, n, device)
        self.hidden = sum(s.m_a * s.n_b for s in shapes)
        self.padded = max(NARROWEST, 1 << (self.hidden - 1).bit_length())
        begins = starts([s.m_a * s.n_b for s in shapes])
        left_at, right_at = starts(left_sizes(shapes)), starts(right_sizes(shapes))
        rows = [
            [left_at[c] + a * s.n_a, s.n_a, s.n_b, q, a, right_at[c] + q, s.m_b, c]
            for c, s in enumerate(shapes)
            for a in range(s.m_a)
            for q in range(s.n_b)
        ]
        self.rows = torch.tensor(rows, dtype=torch.int32).mT.contiguous().to(device)  # (8, R)
        parts = [
            [*s[:4], begin, *at] for s, begin, *at in zip(shapes, begins, left_at, right_at, strict=True)
        ]
        self.parts = torch.tensor(parts, dtype=torch.int32).to(device)  # (r, 7)
        first = shapes[0]
        even = len(set(shapes)) == 1 and all(k & (k - 1) == 0 for k in (first.m_a, first.n_b))
        self.early = (first.m_a, first.n_b) if even else (1, 1)
        sizes = [(s.m_a * s.n_a, s.m_b * s.n_b) for s in shapes]
        work = [
            [side, c, k]
            for side in (0, 1)
            for c, size in enumerate(sizes)
            for k in range(0, size[side], CHUNK)
        ]
        self.work = torch.tensor(work, dtype=torch.int32).to(device)
        self.left_size = sum(left for left, _ in sizes)
        chunks = [-(-right // CHUNK) for _, right in sizes]
        begin = len(work) - sum(chunks)
        counts = [[begin + k for k in starts(chunks)], chunks]
        self.counts = torch.tensor(counts, dtype=torch.int32).to(device)  # (2, r)
        self.compiled: dict[Any, Any] = {}

    def fit(self, tile: Tile, itemsize: int) -> Tile:
        """A tile narrowed where hidden numbers are many or wide."""
        columns = tile.columns // (max(1, self.padded // 32) * max(1, itemsize // 2))
        return tile._replace(columns=max(16, columns))

    def full(self, columns: int, *sizes: int) -> bool:
        """Whether tiles of so many columns fill matrices of these widths, and R needs no padding."""
        return self.hidden == self.padded and all(size % columns == 0 for size in sizes)


@cache
@torch.inference_mode(False)  # what an evaluation builds first serves training, too
def make_thin_plan(shapes: tuple[Shape, ...], m: int, n: int, device: torch.device) -> ThinPlan:
    """Makes the :class:`ThinPlan` of an m × n layer, once.

    Args:
        shapes: r shapes without identities.
        m: Output features.
        n: Input features.
        device: The GPU.
    """
    return ThinPlan(shapes, m, n, device)
