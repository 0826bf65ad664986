"""What the kernels know of a layer's components; made once for every layer size."""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moka_pl.ops.layout import Shape, group_equal, left_sizes, right_sizes, starts

#: Words, of eight entries each, that a program takes at once at most: one a thread.
WORDS = 256
#: Rows and columns of a tile of ΔW where words of eight entries do not fit.
TILE = (16, 64)
#: Right entries and pairs of left indices that one program of the projection takes at once. With 64 pairs
#: Triton 3.6 took Hopper's asynchronous products, which were faster by a fifth and gave wrong sums.
ENTRIES = 256
PAIRS = 32
#: Components of one shape that share a program of the projection.
MEMBERS = 8
#: Rows of one block row that a program computes in decoding.
DECODE_ROWS = 32
#: Entries that one program of the projection's last step adds up.
CHUNK = 256
#: Parts of each that it loads at once.
TERMS = 8
#: Programs that keep a large GPU busy.
_PROGRAMS = 1024


class Plan:
    """Sizes, offsets and work lists of one layer's kernels.

    Args:
        shapes: r shapes.
        m: Rows of the layer.
        n: Columns of the layer.
        device: Where the kernels run.

    Attributes:
        components: m_a, n_a, m_b, n_b and where A and B begin in the packed factors, for every component.
        aligned: For every component whether eight entries of a row meet one entry of its left factor.
        words: Rows after which the right factors' rows of all components begin again, how many such periods
            and how many words of a row one program builds, where ΔW can be built from words of eight
            entries; else None.
        padded: r, rounded up to a power of two.
        uniform: 1/r for every component, the weights without gates.
        rows: Where every row of ΔW begins in A and in B of every component (-1 beyond), (2 r, m); None if
            words.
        columns: The same for columns, (2 r, n).
        cells: First row and column of every tile of ΔW, and whether a component touches it, (cells, 3).
        tiles: Work list of the projection, one stretch of right entries of one group of components a row.
        splits: Shares that the pairs of a component are split into.
        exact: Whether all components divide the layer, the tiles and wide loads.
        chunks: Work list of the projection's last step.
        dots: For every component the first of its parts of ∂L/∂w and their number, (2, r).
        most: Most tiles of a group.
        decode: Work list for decoding: component, block row, first row in it, n_a, m_b, n_b, identity, and
            where A and B begin.
        ends: Rows of every component, (r,).
        whole: Whether every component covers the layer exactly.
        even: Whether tiles fill the layer.
        compiled: Kernels compiled for this plan.
    """

    def __init__(self, shapes: tuple[Shape, ...], m: int, n: int, device: torch.device) -> None:
        left_at, right_at = starts(left_sizes(shapes)), starts(right_sizes(shapes))
        r = len(shapes)
        self.shapes, self.m, self.n = shapes, m, n
        self.components = _components(shapes, left_at, right_at)
        self.padded = 1 << (r - 1).bit_length()
        self.uniform = torch.full((r,), 1 / r, device=device)
        self.whole = all((s.rows, s.cols) == (m, n) and not s.identity for s in shapes)
        self.even = m % TILE[0] == 0 and n % TILE[1] == 0

        self.aligned = tuple(s.n_b % 8 == 0 for s in shapes)
        self.words = _words(shapes, self.aligned, m, n)
        self.rows = self.columns = self.cells = None
        if self.words is None:
            rows, columns = _factor_tables(shapes, m, n, left_at, right_at)
            self.rows, self.columns = rows.to(device), columns.to(device)
            self.cells = _cells(shapes, m, n).to(device)

        groups = _groups(shapes)
        self.splits = _splits(groups)
        tiles, chunks, dots, self.most = _projection_work(groups, left_at, right_at, self.splits, n)
        self.tiles, self.chunks, self.dots = tiles.to(device), chunks.to(device), dots.to(device)
        self.exact = self.whole and all(
            s.m_b * s.n_b % ENTRIES == 0 and s.m_a * s.n_a % (self.splits * PAIRS) == 0 and s.n_b % 8 == 0
            for s in shapes
        )
        self.decode = _decode_work(shapes, left_at, right_at).to(device)
        self.ends = _table([s.rows for s in shapes]).to(device)
        self.compiled: dict[Any, Any] = {}


@cache
@torch.inference_mode(False)  # what an evaluation builds first serves training, too
def make_plan(shapes: tuple[Shape, ...], m: int, n: int, device: torch.device) -> Plan:
    """Makes the :class:`Plan` of an m × n layer, once.

    Args:
        shapes: r shapes.
        m: Output features.
        n: Input features.
        device: The GPU.
    """
    return Plan(shapes, m, n, device)


def _words(
    shapes: tuple[Shape, ...], aligned: tuple[bool, ...], m: int, n: int
) -> tuple[int, int, int] | None:
    """:attr:`Plan.words`: components must cover the layer, and more than half of them be aligned.

    Args:
        shapes: r shapes.
        aligned: For every component whether eight entries of a row meet one entry of its left factor.
        m: Rows of the layer.
        n: Columns of the layer.
    """
    covered = all(s.rows >= m and s.cols >= n and not s.identity for s in shapes)
    if not covered or n % 8 or sum(aligned) <= len(shapes) // 2:
        return None
    period = math.lcm(*(s.m_b for s in shapes))
    width = max(32, min(WORDS, 1 << (n // 8 - 1).bit_length()))
    return (period, 4, width) if 2 * period <= m else (m, 1, width)


def _factor_tables(
    shapes: tuple[Shape, ...], m: int, n: int, left_at: list[int], right_at: list[int]
) -> tuple[Tensor, Tensor]:
    """:attr:`Plan.rows`, (2 r, m), and :attr:`Plan.columns`, (2 r, n)."""
    rows, columns = [], []
    i, j = torch.arange(m), torch.arange(n)
    for s, left, right in zip(shapes, left_at, right_at, strict=True):
        a, p = i // s.m_b, j // s.n_b
        # With an identity only the numbers of block row and column are compared.
        row_left = a if s.identity else left + a * s.n_a
        rows += [row_left.where(a < s.m_a, -1), right + i % s.m_b * s.n_b]
        columns += [p.where(p < s.n_a, -1), j % s.n_b]
    return torch.stack(rows).int(), torch.stack(columns).int()


def _cells(shapes: tuple[Shape, ...], m: int, n: int) -> Tensor:
    """All tiles, and whether a component has an entry there: for MoKA_s in a band around the diagonal."""
    down, across = TILE
    touched = torch.zeros(-(-m // down), -(-n // across), dtype=torch.bool)
    for s in shapes:
        blocks = [(k, k) for k in range(min(s.m_a, s.n_a))] if s.identity else []
        size = (s.m_b, s.n_b) if s.identity else (s.rows, s.cols)
        for a, p in blocks or [(0, 0)]:
            top, start = a * size[0], p * size[1]
            bottom, end = min(top + size[0], m), min(start + size[1], n)
            if top < bottom and start < end:
                touched[top // down : -(-bottom // down), start // across : -(-end // across)] = True
    corners = torch.ones_like(touched).nonzero() * torch.tensor(TILE)
    return torch.cat([corners, touched.flatten()[:, None]], 1).int().contiguous()


def _groups(shapes: tuple[Shape, ...]) -> list[tuple[Shape, list[int]]]:
    """Components of one shape, at most ``MEMBERS`` in a group."""
    return [
        (shape, members[k : k + MEMBERS])
        for shape, members in group_equal(shapes).items()
        for k in range(0, len(members), MEMBERS)
    ]


def _splits(groups: list[tuple[Shape, list[int]]]) -> int:
    """Shares of the pairs, a power of two, that keep a large GPU busy."""
    number = sum(-(-shape.m_b * shape.n_b // ENTRIES) for shape, _ in groups)
    pairs = max(min(s.m_a, s.n_a) if s.identity else s.m_a * s.n_a for s, _ in groups)
    wanted = min(_PROGRAMS // number, -(-pairs // PAIRS), 64)
    return 1 << max(wanted, 1).bit_length() - 1


def _projection_work(
    groups: list[tuple[Shape, list[int]]], left_at: list[int], right_at: list[int], splits: int, n: int
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Rows for the projection and for its last step.

    A tile: m_a, n_a, m_b, n_b, identity, first entry, number in its group, whether 8 entries always lie side
    by side in a row of D, then where ``MEMBERS`` left factors begin and as many right ones, -1 for none. A
    chunk: side (0 left, 1 right), component, first packed entry, entries, parts to add up.
    """
    tiles: list[list[int]] = []
    chunks: list[list[int]] = []
    dots = [[0] * len(left_at), [0] * len(left_at)]
    most = 0
    for shape, members in groups:
        entries = shape.m_b * shape.n_b
        wide = int(n % 8 == shape.n_b % 8 == 0)
        stretches = range(0, entries, ENTRIES)
        fill = [-1] * (MEMBERS - len(members))
        begins = [left_at[i] for i in members] + fill + [right_at[i] for i in members] + fill
        first = len(tiles)
        for number, start in enumerate(stretches):
            tiles.append([*shape[:4], int(shape.identity), start, number, wide, *begins])
        most = max(most, len(stretches))
        for number, i in enumerate(members):
            left = 0 if shape.identity else shape.m_a * shape.n_a
            for side, at, size, parts in (
                (0, left_at[i], left, len(stretches)),
                (1, right_at[i], entries, splits),
            ):
                chunks += [[side, i, at + k, min(CHUNK, size - k), parts] for k in range(0, size, CHUNK)]
            dots[0][i], dots[1][i] = first * splits * MEMBERS + number, len(stretches) * splits
    return _table(tiles), _table(chunks), _table(dots), most


def _decode_work(shapes: tuple[Shape, ...], left_at: list[int], right_at: list[int]) -> Tensor:
    """Rows for decoding, as :attr:`Plan.decode` says."""
    return _table(
        [
            [c, a, b, s.n_a, s.m_b, s.n_b, int(s.identity), left_at[c], right_at[c]]
            for c, s in enumerate(shapes)
            for a in range(min(s.m_a, s.n_a) if s.identity else s.m_a)
            for b in range(0, s.m_b, DECODE_ROWS)
        ]
    )


def _components(shapes: tuple[Shape, ...], left_at: list[int], right_at: list[int]) -> tuple[int, ...]:
    """Six numbers of every component, as :attr:`Plan.components` says."""
    return tuple(
        value
        for s, left, right in zip(shapes, left_at, right_at, strict=True)
        for value in (s.m_a, s.n_a, s.m_b, s.n_b, left, right)
    )


def _table(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
