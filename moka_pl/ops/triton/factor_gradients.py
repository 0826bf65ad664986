"""Gradients of the factors of few components from x and ∂L/∂y, without the m × n gradient of ΔW.

Reference: :func:`moka_pl.ops.dense.project` of D = Σ_t y_t x_tᵀ, y being ∂L/∂y.

With X_t = x_t as an (n_a, n_b) matrix and Y_t = y_t as an (m_a, m_b) one, the gradients of a component are
    dA = w Σ_t Y_t (X_t Bᵀ)ᵀ = w Σ_t (Y_t B) X_tᵀ,   dB = w Σ_t (Aᵀ Y_t)ᵀ X_t = w Σ_t Y_tᵀ (A X_t),
    dw = ⟨dB / w, B⟩.
Four small products a token, by way of n_a × m_b or of m_a × n_b matrices, whichever is less. A program keeps
these to itself: x and y are read once for each component, where D takes m · n multiply-adds a token, and is
read again for the projection.
"""

from functools import cache, cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from moka_pl.ops.layout import Shape, left_sizes, right_sizes, starts
from moka_pl.ops.triton.gates import Gates
from moka_pl.ops.triton.launch import launch
from moka_pl.ops.triton.plan import CHUNK, MEMBERS, Plan
from moka_pl.ops.triton.projection import add_product, finish, fused_projection

#: Right rows that a program takes at once, numbers that it holds of a product, and programs for a component.
_ROWS, _NUMBERS, _PROGRAMS = 64, 16384, 264
#: Multiply-adds of D and of its projection, for an entry, that one of these products costs as much as; and
#: tokens whose D costs as much as a projection.
_COST, _PROJECTION = 6, 2000
#: Tokens of a trial, and the largest relative difference: several times that of bfloat16's roundings.
_TRIED, _TOLERANCE = 300, 0.05


class Component:
    """Tiles and places of one component.

    Args:
        shape: Its shape.
        left_at: Where A begins in the packed left factors.
        right_at: Where B begins in the packed right ones.

    Attributes:
        sizes: m_a, n_a, m_b, n_b, and powers of two that hold m_a, n_a, the rows of B of a program and n_b.
        left_first: Whether products go by way of m_a × n_b matrices, A X and Y B, and not of n_a × m_b ones.
        chunks: Programs that share the rows of B.
        numbers: Multiply-adds a token.
        largest: Numbers of the largest matrix that a program holds.
        places: Where A and B begin.
        warps: Of a program.
    """

    def __init__(self, shape: Shape, left_at: int, right_at: int) -> None:
        a, p, b, q = (max(16, 1 << (size - 1).bit_length()) for size in shape[:4])
        part = max(16, min(b, _ROWS, _NUMBERS // p))
        chunks = -(-shape.m_b // part)
        numbers = 2 * chunks * p * part * (a + q)
        self.left_first = 2 * a * q * (p + b) < numbers and max(a * b, b * q) <= _NUMBERS
        if self.left_first:
            part, chunks, numbers = b, 1, 2 * a * q * (p + b)
        self.chunks, self.numbers = chunks, numbers
        self.sizes = (*shape[:4], a, p, part, q)
        self.places = left_at, right_at
        self.largest = max(a * p, p * q, a * part, part * q, a * q if self.left_first else p * part)
        self.warps = 4 if self.largest <= 8192 else 8


class FactorPlan:
    """What the kernels know of a layer whose factors' gradients are summed without D.

    Args:
        plan: The layer's plan.

    Attributes:
        components: Of each component its tiles.
        sizes: Numbers of left and of right entries.
        chunks: Work list of the last step, as :attr:`moka_pl.ops.triton.plan.Plan.chunks`.
        dots: As :attr:`moka_pl.ops.triton.plan.Plan.dots`.
        most: Most programs that share the rows of a B.
        work: Multiply-adds a token.
        fits: Whether a program can hold each matrix.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan, shapes = plan, plan.shapes
        lefts, rights = left_sizes(shapes), right_sizes(shapes)
        places = zip(shapes, starts(lefts), starts(rights), strict=True)
        self.components = [Component(*place) for place in places]
        self.sizes = sum(lefts), sum(rights)
        self.most = max(component.chunks for component in self.components)
        self.work = sum(component.numbers for component in self.components)
        self.fits = all(component.largest <= _NUMBERS for component in self.components)
        chunks: list[list[int]] = []
        dots: tuple[list[int], list[int]] = [], []
        for i, component in enumerate(self.components):
            for side, size, parts in ((0, lefts[i], component.chunks), (1, rights[i], 1)):
                at = component.places[side]
                chunks += [[side, i, at + k, min(CHUNK, size - k), parts] for k in range(0, size, CHUNK)]
            dots[0].append(i * self.most * MEMBERS)
            dots[1].append(component.chunks)
        device = plan.uniform.device
        self.chunks = torch.tensor(chunks, dtype=torch.int32, device=device)
        self.dots = torch.tensor(dots, dtype=torch.int32, device=device)

    def usable(self, tokens: int) -> bool:
        """Whether the sums cost less than D and its projection, and were found to be the same.

        Args:
            tokens: T.
        """
        if not self.pays(tokens):
            return False
        # Nothing can be tried while a graph is recorded; the same step has run as usual before.
        tried = "agrees" in vars(self)
        return self.agrees if tried or not _recording() else False

    def pays(self, tokens: int) -> bool:
        """Whether the sums cost less than D and its projection; never without tokens.

        Args:
            tokens: T.
        """
        other = self._plan.m * self._plan.n * (tokens + _PROJECTION)
        return self.fits and 0 < _COST * self.work * tokens < other

    @cached_property
    def agrees(self) -> bool:
        """Whether the sums are those of D and its projection, as tried once on random numbers of this GPU.

        Triton has been seen to compile products for Hopper that were wrong (see ``plan.py``).
        """
        plan, device = self._plan, self._plan.uniform.device
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(*size, device=device, generator=generator)

        x, grad = draw(_TRIED, plan.n).bfloat16(), draw(_TRIED, plan.m).bfloat16()
        factors = draw(self.sizes[0]), draw(self.sizes[1])
        gates = Gates(plan.uniform)
        try:
            found = factor_gradients(plan, self, grad, x, *factors, gates)
        except triton.TritonError:  # a smaller GPU's shared memory does not hold a program
            return False
        expected = fused_projection(plan, grad.mT @ x, *factors, gates)
        return all(
            bool((one - other).norm() <= _TOLERANCE * other.norm())
            for one, other in zip(found[:2], expected[:2], strict=True)  # the weights' follow from the right
        )


def _recording() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def make_factor_plan(plan: Plan) -> FactorPlan | None:
    """Makes a layer's :class:`FactorPlan`, once; None where left factors are identities.

    Args:
        plan: The layer's plan.
    """
    return None if any(shape.identity for shape in plan.shapes) else FactorPlan(plan)


@triton.jit  # type: ignore[untyped-decorator]
def _read(at, inside, ALL: tl.constexpr):  # type: ignore[no-untyped-def]
    """What lies there, and zeros where nothing does."""
    return tl.load(at) if ALL else tl.load(at, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["tokens", "share"])  # type: ignore[untyped-decorator]
def _sum_kernel(  # type: ignore[no-untyped-def]
    parts, grad, x, left, right, tokens, share, m, n, row, left_size, begin_right, begin_dots,
    LEFT_AT: tl.constexpr, RIGHT_AT: tl.constexpr,
    M_A: tl.constexpr, N_A: tl.constexpr, M_B: tl.constexpr, N_B: tl.constexpr,
    PA: tl.constexpr, PP: tl.constexpr, PB: tl.constexpr, PQ: tl.constexpr,
    LEFT_FIRST: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr, MEMBERS: tl.constexpr,
):  # fmt: skip
    """Sums over a share of the tokens of dA and of some rows of dB, without w (see above)."""
    chunk, part = tl.program_id(0), tl.program_id(1)
    a, p, q = tl.arange(0, PA), tl.arange(0, PP), tl.arange(0, PQ)
    b = chunk * PB + tl.arange(0, PB)
    dtype: tl.constexpr = grad.dtype.element_ty
    in_left = (a < M_A)[:, None] & (p < N_A)[None, :]
    in_right = (b < M_B)[:, None] & (q < N_B)[None, :]
    at_left = a[:, None] * N_A + p[None, :]
    at_right = b[:, None] * N_B + q[None, :]
    at_x = p[:, None] * N_B + q[None, :]
    at_y = a[:, None] * M_B + b[None, :]
    # No mask where none is needed, and none that differs along a row: loads would not be wide.
    in_x = tl.full((PP, 1), 1, tl.int1)
    in_y = tl.full((PA, 1), 1, tl.int1)
    if PP != N_A:
        in_x = (p < N_A)[:, None]
    if PA != M_A:
        in_y = (a < M_A)[:, None]
    if PQ != N_B:
        in_x = in_x & (q < N_B)[None, :]
    if M_B % PB != 0:
        in_y = in_y & (b < M_B)[None, :]
    if not WHOLE:
        in_x = in_x & (at_x < n)
        in_y = in_y & (at_y < m)
    factor = tl.load(left + LEFT_AT + at_left, mask=in_left, other=0.0).to(dtype)  # A, (PA, PP)
    entries = tl.load(right + RIGHT_AT + at_right, mask=in_right, other=0.0)  # B, (PB, PQ)
    narrow = entries.to(dtype)
    sums_left = tl.zeros((PA, PP), tl.float32)
    sums_right = tl.zeros((PB, PQ), tl.float32)
    begin = part * share
    from_x = x + begin.to(tl.int64) * n + at_x
    from_y = grad + begin.to(tl.int64) * m + at_y
    for _ in range(begin, tl.minimum(begin + share, tokens)):
        x_t = _read(from_x, in_x, WHOLE and PP == N_A and PQ == N_B)  # (PP, PQ)
        y_t = _read(from_y, in_y, WHOLE and PA == M_A and M_B % PB == 0)  # (PA, PB)
        from_x += n
        from_y += m
        if LEFT_FIRST:
            met = add_product(factor, x_t, tl.zeros((PA, PQ), tl.float32), UPCAST).to(dtype)  # A X
            sums_right = add_product(tl.trans(y_t), met, sums_right, UPCAST)  # (PB, PQ)
            met = add_product(y_t, narrow, tl.zeros((PA, PQ), tl.float32), UPCAST).to(dtype)  # Y B
            sums_left = add_product(met, tl.trans(x_t), sums_left, UPCAST)  # (PA, PP)
        else:
            met = add_product(x_t, tl.trans(narrow), tl.zeros((PP, PB), tl.float32), UPCAST).to(dtype)  # X Bᵀ
            sums_left = add_product(y_t, tl.trans(met), sums_left, UPCAST)  # (PA, PP)
            met = add_product(tl.trans(factor), y_t, tl.zeros((PP, PB), tl.float32), UPCAST).to(dtype)  # Aᵀ Y
            sums_right = add_product(tl.trans(met), x_t, sums_right, UPCAST)  # (PB, PQ)
    to = parts + part.to(tl.int64) * row
    tl.store(to + chunk * left_size + LEFT_AT + at_left, sums_left, mask=in_left)
    tl.store(to + begin_right + RIGHT_AT + at_right, sums_right, mask=in_right)
    tl.store(to + begin_dots + chunk * MEMBERS, tl.sum(sums_right * entries))


def factor_gradients(
    plan: Plan, sums: FactorPlan, grad: Tensor, x: Tensor, left: Tensor, right: Tensor, gates: Gates
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of ``left``, ``right`` and ``gates.values``.

    Args:
        plan: The layer's plan, without identities.
        sums: What is known of its components.
        grad: ∂L/∂y, shape (T, m), contiguous, bfloat16.
        x: Input, shape (T, n), contiguous, of the same dtype.
        left: Packed left factors, float32.
        right: Packed right factors, float32.
        gates: The weights w.
    """
    tokens, r = len(x), len(sums.components)
    begin_right = sums.most * sums.sizes[0]
    begin_dots = begin_right + sums.sizes[1]
    row = begin_dots + r * sums.most * MEMBERS
    shares = max(1, min(_PROGRAMS // sums.most, tokens))
    share = -(-tokens // shares)
    parts = torch.empty(-(-tokens // share), row, dtype=torch.float32, device=right.device)
    for i, component in enumerate(sums.components):
        launch(
            _sum_kernel, plan.compiled, ("sums", i, grad.dtype), (component.chunks, len(parts), 1),
            (left, right, grad, x),
            (parts, grad, x, left, right, tokens, share, plan.m, plan.n, row, sums.sizes[0], begin_right,
             begin_dots + i * sums.most * MEMBERS, *component.places, *component.sizes, component.left_first,
             plan.whole, not grad.is_cuda, MEMBERS),
            num_warps=component.warps, num_stages=3,
        )  # fmt: skip
    places: Any = (*sums.sizes, begin_right, begin_dots)
    return finish(plan, sums.chunks, sums.dots, parts.sum(0), left, right, gates, places)
