"""Which components share the tiles of ΔW, and where the pieces of these lie.

Row i meets row i // m_b of a left factor and row i % m_b of a right one. Of components with different m_b,
rows that lie lcm(m_b) apart meet the same right entries, and gcd(m_b) rows, aligned, the same left ones;
columns likewise. A tile is such a small block of rows and columns, once in every period of both::

    entries    neighbours in a block: a component has a right entry for each, the same in every block
    pairs      the blocks: a component has a left entry for each, the same for all its neighbours

so that a tile of ΔW, (pairs, entries), is ``Σ_i w_i a_i b_iᵀ`` with vectors of left and of right entries,
whatever the shapes of these components.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moka_pl.ops.layout import Shape, left_sizes, right_sizes, starts
from moka_pl.ops.triton.plan import CHUNK, Plan

#: Components that share tiles at most: the narrowest side of a matrix product in half precision.
MEMBERS = 16
#: Entries of a tile at most and at least, and the least columns: a wide load.
ENTRIES, _FEWEST, _NARROWEST = 256, 64, 8
#: Columns of a tile at most: what a row of a tile fills of a cache line.
_WIDEST = 64
#: Pairs that a program takes at once, and the least of a group.
PAIRS, _LEAST_PAIRS = 32, 64
#: Parts of gradients at most: places in them are numbers of 32 bits.
_MOST_PARTS = 2**31
#: Programs that keep a large GPU busy.
_PROGRAMS = 256


class Group(NamedTuple):
    """Components that share tiles.

    Attributes:
        members: Their indices.
        rows: The period of rows.
        columns: That of columns.
        tile: Rows and columns of the entries of a tile.
        splits: Shares that the pairs of a tile are split into.
    """

    members: tuple[int, ...]
    rows: int
    columns: int
    tile: tuple[int, int]
    splits: int

    @property
    def tiles(self) -> int:
        """Tiles of a period."""
        return self.rows // self.tile[0] * (self.columns // self.tile[1])

    def left_parts(self, shape: Shape) -> int:
        """Tiles that have a share in one left entry."""
        return shape.m_b // self.tile[0] * (shape.n_b // self.tile[1])

    def right_parts(self, shape: Shape) -> int:
        """Programs that have a share in one right entry."""
        return self.rows // shape.m_b * (self.columns // shape.n_b) * self.splits


def _power(number: int, most: int) -> int:
    """The largest power of two that divides a number, up to another one."""
    return min(number & -number, most)


def _group(members: tuple[int, ...], shapes: tuple[Shape, ...], m: int, n: int) -> Group | None:
    """These components, if tiles can be made for them."""
    own = [shapes[i] for i in members]
    rows, columns = math.lcm(*(s.m_b for s in own)), math.lcm(*(s.n_b for s in own))
    across = _power(math.gcd(*(s.n_b for s in own)), _WIDEST)
    down = _power(math.gcd(*(s.m_b for s in own)), ENTRIES // across)
    pairs = m // rows * (n // columns)
    if len(own) > MEMBERS or across < _NARROWEST or down * across < _FEWEST or pairs < _LEAST_PAIRS:
        return None
    tiles = rows // down * (columns // across)
    wanted = min(-(-_PROGRAMS // tiles), pairs // PAIRS)
    return Group(members, rows, columns, (down, across), 1 << wanted.bit_length() - 1)


def groups_of(shapes: tuple[Shape, ...], m: int, n: int) -> list[Group] | None:
    """Puts the components of an m × n layer into few groups; None where some share no tiles.

    Args:
        shapes: r shapes.
        m: Rows of the layer.
        n: Columns of the layer.
    """
    if any((s.rows, s.cols) != (m, n) or s.identity for s in shapes):
        return None
    groups: list[Group] = []
    for i in range(len(shapes)):
        for k, group in enumerate(groups):
            larger = _group((*group.members, i), shapes, m, n)
            if larger is not None:
                groups[k] = larger
                break
        else:
            alone = _group((i,), shapes, m, n)
            if alone is None:
                return None
            groups.append(alone)
    return groups


class PeriodPlan:
    """What the kernels know of groups.

    Args:
        plan: The layer's plan.
        groups: Its groups.

    Attributes:
        groups: The groups.
        tables: For every group what kernels read of each of ``MEMBERS`` members, (4 + 4 tiles, MEMBERS):
            the component (-1 for none), n_b, steps in A from a pair to those below and beside it; then for
            every tile where its entries of A and of B begin, and where its parts of their gradients do.
        places: Where a group's parts of ∂L/∂w begin.
        left: Most parts of a left entry.
        right: Most parts of a right entry.
        weights: Parts of ∂L/∂w.
        parts: All parts.
        chunks: As :attr:`moka_pl.ops.triton.plan.Plan.chunks`.
        dots: As :attr:`moka_pl.ops.triton.plan.Plan.dots`.
        projects: Whether the projection was found to be right; None before it was tried.
        builds: The same of W + ΔW.
    """

    def __init__(self, plan: Plan, groups: list[Group]) -> None:
        shapes, device = plan.shapes, plan.uniform.device
        sizes = left_sizes(shapes), right_sizes(shapes)
        at, totals = (starts(sizes[0]), starts(sizes[1])), (sum(sizes[0]), sum(sizes[1]))
        self.groups = groups
        self.projects: bool | None = None
        self.builds: bool | None = None
        self.tables: list[Tensor] = []
        self.places = starts([group.tiles * group.splits * MEMBERS for group in groups])
        self.weights = sum(group.tiles * group.splits * MEMBERS for group in groups)
        self.left = max(g.left_parts(shapes[i]) for g in groups for i in g.members)
        self.right = max(g.right_parts(shapes[i]) for g in groups for i in g.members)
        self.parts = self.left * totals[0] + self.right * totals[1] + self.weights
        chunks: list[list[int]] = []
        dots = [[0] * len(shapes), [0] * len(shapes)]
        for group, place in zip(groups, self.places, strict=True):
            columns = [_column(group, i, shapes[i], (at[0][i], at[1][i]), totals) for i in group.members]
            columns += [torch.full_like(columns[0], -1)] * (MEMBERS - len(columns))
            self.tables.append(torch.stack(columns, 1).int().contiguous().to(device))
            for number, i in enumerate(group.members):
                parts = group.left_parts(shapes[i]), group.right_parts(shapes[i])
                for side in (0, 1):
                    chunks += [
                        [side, i, at[side][i] + k, min(CHUNK, sizes[side][i] - k), parts[side]]
                        for k in range(0, sizes[side][i], CHUNK)
                    ]
                dots[0][i], dots[1][i] = place + number, group.tiles * group.splits
        self.chunks, self.dots = _table(chunks).to(device), _table(dots).to(device)


def _column(
    group: Group, component: int, shape: Shape, at: tuple[int, int], totals: tuple[int, int]
) -> Tensor:
    """One member's column of :attr:`PeriodPlan.tables`.

    Args:
        group: The group.
        component: Its index.
        shape: Its shape.
        at: Where its A and B begin in the packed factors.
        totals: Entries of all left factors and of all right ones.
    """
    _, n_a, m_b, n_b, _ = shape
    down, across = group.tile
    tile = torch.arange(group.tiles)
    i, j = tile // (group.columns // across) * down, tile % (group.columns // across) * across
    left = at[0] + i // m_b * n_a + j // n_b
    right = at[1] + i % m_b * n_b + j % n_b
    left_part = i % m_b // down * (n_b // across) + j % n_b // across
    right_part = (i // m_b * (group.columns // n_b) + j // n_b) * group.splits
    places = [left, right, left_part * totals[0] + left, right_part * totals[1] + right]
    steps = torch.tensor([component, n_b, group.rows // m_b * n_a, group.columns // n_b])
    return torch.cat([steps, torch.stack(places, 1).flatten()])


def _table(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


@cache
@torch.inference_mode(False)  # what an evaluation builds first serves training, too
def make_period_plan(plan: Plan) -> PeriodPlan | None:
    """Makes a layer's :class:`PeriodPlan`, once; None where some of its components share no tiles.

    Args:
        plan: The layer's plan.
    """
    groups = groups_of(plan.shapes, plan.m, plan.n)
    if groups is None:
        return None
    periods = PeriodPlan(plan, groups)
    return periods if periods.parts < _MOST_PARTS else None
