"""What the thin kernels know of a layer's components; made once for every layer size."""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import torch

from moka_pl.ops.layout import Shape, left_sizes, right_sizes, starts
from moka_pl.ops.thin import hidden_size
from moka_pl.ops.triton.plan import Plan, make_plan

#: The least hidden numbers of a token that a matrix product on a GPU takes.
NARROWEST = 16
#: Columns that one program fills of L and U, and packed entries of which one program adds up the gradient.
COLUMNS, CHUNK = 128, 32
#: Rows of left factors, each of which is a row of W + ΔW that a program adds up, and the most components.
_ROWS, _FEW = (1, 2, 4, 8), 4
#: Programs that keep a large GPU busy, twice over, and the most programs that share the tokens of G.
_PROGRAMS, _BLOCKS = 264, 64


class Tile(NamedTuple):
    """Tokens and columns of a tile, and how a program computes it."""

    tokens: int
    columns: int
    warps: int
    stages: int


#: The tiles of the forward pass, the pass over G and that over x.
FORWARD, OUTPUTS, INPUTS = Tile(32, 128, 4, 6), Tile(64, 128, 4, 3), Tile(64, 128, 4, 3)


class Grids(NamedTuple):
    """How the passes over some tokens are split among programs.

    Attributes:
        forward: Tile of the forward pass.
        outputs: Tile of the pass over G.
        inputs: Tile of the pass over x.
        full: For each pass, whether tiles fill the matrices, and R needs no padding.
        times: Tiles of tokens that a program of the pass over G takes one after another.
        blocks: Programs that share the tokens there, each with a part of ∂L/∂U.
        columns: Columns that such a program takes.
        shares: Programs that share the columns, each with a part of ∂L/∂hidden.
        tokens: Tokens that a program of the pass over x takes.
        stretches: Programs that share the tokens there, each with a part of ∂L/∂L.
    """

    forward: Tile
    outputs: Tile
    inputs: Tile
    full: tuple[bool, bool, bool]
    times: int
    blocks: int
    columns: int
    shares: int
    tokens: int
    stretches: int


class ThinPlan:
    """Sizes, tables and work lists of one layer's thin kernels.

    ∂L/∂L and ∂L/∂U are kept where L and U have entries of the factors only: for every component as
    (m_a, n_a n_b), and as (m_a n_b, m_b).

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
            m_b, its component, its first row in U and the one after the last, and where what is kept of its
            columns of L and its rows of U, counted from the first of all, begins, (12, R).
        merged: m_a, n_a, m_b, n_b and the number of components, where
            :mod:`moka_pl.ops.triton.thin.merged` adds them to W; else nothing.
        kept: Entries that are kept of L and of U.
        left_size: Entries of all left factors.
        work: Of every stretch of packed entries its side (0 left, 1 right), component, first entry, m_a, n_a,
            m_b, n_b, and where its component begins in the packed vector and in what is kept.
        counts: For every component the first of its parts of ∂L/∂w in ``work``, and their number, (2, r).
        grids: Returns the :class:`Grids` for so many tokens and bytes of a number.
        compiled: Kernels compiled for this plan.
    """

    def __init__(self, shapes: tuple[Shape, ...], m: int, n: int, device: torch.device) -> None:
        self.plan: Plan = make_plan(shapes, m, n, device)
        self.hidden = hidden_size(shapes)
        self.padded = max(NARROWEST, 1 << (self.hidden - 1).bit_length())
        self.merged = _merged(shapes, m, n)
        left_at, right_at = starts(left_sizes(shapes)), starts(right_sizes(shapes))
        kept = [s.m_a * s.cols for s in shapes], [s.n_b * s.rows for s in shapes]
        down_at, up_at = starts(kept[0]), starts(kept[1])
        self.kept = sum(kept[0]), sum(kept[1])
        rows = [
            [left_at[c] + a * s.n_a, s.n_a, s.n_b, q, a, right_at[c] + q, s.m_b, c, a * s.m_b,
             (a + 1) * s.m_b, down_at[c] + a * s.cols, up_at[c] + ((a * s.n_b + q) - a) * s.m_b]
            for c, s in enumerate(shapes)
            for a in range(s.m_a)
            for q in range(s.n_b)
        ]  # fmt: skip
        self.rows = torch.tensor(rows, dtype=torch.int32).mT.contiguous().to(device)  # (12, R)
        sizes = left_sizes(shapes), right_sizes(shapes)
        self.left_size = sum(sizes[0])
        begins = (left_at, down_at), (right_at, up_at)
        work = [
            [side, c, k, *s[:4], begins[side][0][c], begins[side][1][c]]
            for side in (0, 1)
            for c, s in enumerate(shapes)
            for k in range(0, sizes[side][c], CHUNK)
        ]
        self.work = torch.tensor(work, dtype=torch.int32).to(device)
        chunks = [-(-size // CHUNK) for size in sizes[1]]
        first = len(work) - sum(chunks)
        counts = [[first + k for k in starts(chunks)], chunks]
        self.counts = torch.tensor(counts, dtype=torch.int32).to(device)  # (2, r)
        self.grids = lru_cache(256)(self._grids)
        self.compiled: dict[Any, Any] = {}

    def _grids(self, tokens: int, itemsize: int) -> Grids:
        m, n = self.plan.m, self.plan.n
        # Narrower tiles where hidden numbers are many or wide.
        part = max(1, self.padded // 32) * max(1, itemsize // 2)
        tiles = [tile._replace(columns=max(16, tile.columns // part)) for tile in (FORWARD, OUTPUTS, INPUTS)]
        forward, outputs, inputs = tiles
        most = min(_BLOCKS, max(16, tokens * itemsize * m // (16 * self.kept[1])))
        blocks, stripes = -(-tokens // outputs.tokens), -(-m // outputs.columns)
        times = -(-blocks // min(blocks, most))
        blocks = -(-blocks // times)
        columns = -(-stripes // max(1, min(stripes, _PROGRAMS // blocks))) * outputs.columns
        lengths, stripes = -(-tokens // inputs.tokens), -(-n // inputs.columns)
        stretch = -(-lengths // max(1, min(lengths, 2 * _PROGRAMS // stripes))) * inputs.tokens
        widths = (m, n), (m,), (n,)
        spans = forward.tokens, blocks * times * outputs.tokens, inputs.tokens
        full = [
            self.hidden == self.padded and tokens % span == 0 and all(w % tile.columns == 0 for w in width)
            for tile, span, width in zip(tiles, spans, widths, strict=True)
        ]
        return Grids(
            forward, outputs, inputs, (full[0], full[1], full[2]),
            times, blocks, columns, -(-m // columns), stretch, -(-tokens // stretch),
        )  # fmt: skip


def _merged(shapes: tuple[Shape, ...], m: int, n: int) -> tuple[int, ...]:
    """:attr:`ThinPlan.merged`: few components of one shape, as large as the layer, in whole words."""
    first = shapes[0]
    even = first.rows == m and first.cols == n and n % 8 == 0 and 8 % first.n_b == 0
    if set(shapes) != {first} or not even or first.m_a not in _ROWS or len(shapes) > _FEW:
        return ()
    return (*first[:4], len(shapes))


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
