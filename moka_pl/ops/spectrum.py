"""Norms, singular values and effective ranks of updates, from their factors.

For ΔW with singular values σ_1 ≥ σ_2 ≥ … and shares p_i = σ_i² / Σ_j σ_j²:
    stable rank     ‖ΔW‖_F² / ‖ΔW‖_2² = 1 / p_1
    entropy rank    exp(−Σ_i p_i ln p_i): the number of equal singular values with that entropy
    rank            number of σ_i above σ_1 · max(m, n) · ε, ε of the dtype that was trained

1 ≤ stable rank ≤ entropy rank ≤ rank ≤ min(m, n), all equal for equal singular values.

Sources: O. Roy and M. Vetterli, "The effective rank" (2007), here of the squared singular values; M. Rudelson
and R. Vershynin, "Sampling from large matrices" (2007), for the stable rank; C. Van Loan, "The ubiquitous
Kronecker product" (2000), for the singular values of A ⊗ B.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from moka_pl.errors import AdapterError
from moka_pl.ops.kronecker import delta_weight, lora_factors
from moka_pl.ops.layout import Shape, exact_rank, unpack


class Spectrum(NamedTuple):
    """Singular values and effective ranks of one matrix.

    Attributes:
        sizes: Singular values, descending, float64; zeros beyond the exact LoRA rank may be left out.
        rank: Numerical rank; 0 for a zero matrix, as are all ranks.
        stable_rank: Energy over the energy of the leading direction.
        entropy_rank: Exponential of the entropy of the directions' shares of energy.
        norm: Frobenius norm.
    """

    sizes: Tensor
    rank: int
    stable_rank: float
    entropy_rank: float
    norm: float


class Update(NamedTuple):
    """``ΔW = Σ_i w_i (A_i ⊗ B_i)``, cut or zero-filled to m × n.

    Attributes:
        weights: w = s · α, (r,).
        left: Packed left factors (see :mod:`moka_pl.ops.layout`).
        right: Packed right factors.
        shapes: r shapes.
        m: Output features.
        n: Input features.
    """

    weights: Tensor
    left: Tensor
    right: Tensor
    shapes: tuple[Shape, ...]
    m: int
    n: int

    @property
    def lora_rank(self) -> int:
        """The rank R of the LoRA that it is exactly."""
        return exact_rank(self.shapes, self.m, self.n)

    @property
    def has_small_rank(self) -> bool:
        """Whether it is cheaper as lora_B · lora_A than as a matrix."""
        return self.lora_rank < min(self.m, self.n)

    @property
    def cost(self) -> int:
        """Multiply-adds, roughly, that its singular values take."""
        if _is_product(self):
            return sum(max(side) * min(side) ** 2 for side in (self.shapes[0][:2], self.shapes[0][2:4]))
        rank = self.lora_rank
        return (self.m + self.n) * rank**2 + 4 * rank**3

    @property
    def entries(self) -> int:
        """Entries of the largest matrix that they take."""
        shapes = self.shapes
        largest = max(max(s.m_a * s.n_a, s.m_b * s.n_b) for s in shapes)
        if _is_product(self):
            return largest
        if self.has_small_rank:
            return max(largest, *(max(s.rows, s.cols, self.m, self.n) * self.lora_rank for s in shapes))
        return max(largest, self.m * self.n, *(s.rows * s.cols for s in shapes))


def spectrum_of(sizes: Tensor, longest: int, precision: float) -> Spectrum:
    """Computes effective ranks.

    Args:
        sizes: Singular values, descending, float64.
        longest: max(m, n).
        precision: ε of the dtype that the factors were trained in.

    Raises:
        AdapterError: If they are not finite.
    """
    if not torch.isfinite(sizes).all():
        raise AdapterError(
            "an update holds a NaN or an infinity: its training diverged. Use an earlier adapter"
        )
    energy = sizes.square()
    total = float(energy.sum())
    if total == 0:
        return Spectrum(sizes, 0, 0.0, 0.0, 0.0)
    shares = energy / total
    entropy = -torch.special.xlogy(shares, shares).sum()
    rank = int((sizes > sizes[0] * longest * precision).sum())
    return Spectrum(sizes, rank, 1 / float(shares[0]), float(entropy.exp()), total**0.5)


def update_spectrum(update: Update) -> Spectrum:
    """Computes the singular values of ΔW in float64, in the cheapest of three ways.

    A single A ⊗ B has the products of the factors' singular values. A LoRA of small rank R has those of the
    R × R matrix R_B R_Aᵀ, from the QR decompositions of lora_B and lora_Aᵀ. Anything else has the square
    roots of the eigenvalues of ΔW ΔWᵀ or ΔWᵀ ΔW, whichever is smaller: values below 1e-8 σ_1 are noise.

    Args:
        update: The update.
    """
    double = _double(update)
    if _is_product(double):
        ((a, b),) = unpack(double.left, double.right, double.shapes)
        left = torch.ones(double.shapes[0].m_a).to(b) if a is None else torch.linalg.svdvals(a)
        sizes = torch.outer(left, torch.linalg.svdvals(b)).flatten() * double.weights.abs()
    elif double.has_small_rank:
        lora_a, lora_b = lora_factors(*double)  # (R, n), (m, R)
        _, right = torch.linalg.qr(lora_a.T, mode="r")  # (R, R)
        _, left = torch.linalg.qr(lora_b, mode="r")  # (R, R)
        sizes = torch.linalg.svdvals(left @ right.T)
    else:
        delta = delta_weight(*double)  # (m, n)
        gram = delta @ delta.T if double.m <= double.n else delta.T @ delta
        sizes = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    dtype = update.right.dtype
    return spectrum_of(sizes.sort(descending=True).values, max(update.m, update.n), torch.finfo(dtype).eps)


def norm_and_stable_rank(update: Update) -> tuple[float, float]:
    """Computes ‖ΔW‖ and the stable rank without the other singular values.

    σ_1 is that of a subspace iteration (Halko, Martinsson and Tropp, "Finding structure with randomness",
    2011): where singular values lie close together, up to a few thousandths too small.

    Args:
        update: The update.
    """
    delta = delta_weight(*_double(update)).float()  # (m, n)
    norm = float(delta.norm())
    if norm == 0:
        return 0.0, 0.0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        _, sizes, _ = torch.svd_lowrank(delta, q=min(16, *delta.shape), niter=16)
    return norm, (norm / float(sizes[0])) ** 2


def component_norms(update: Update) -> Tensor:
    """Frobenius norms of the components w_i (A_i ⊗ B_i), as far as they lie within m × n, (r,), float64.

    ‖A ⊗ B‖ = ‖A‖ ‖B‖; where the product stands out of the layer, whole blocks and cut ones count apart.

    Args:
        update: The update.
    """
    double = _double(update)
    norms = []
    for (a, b), shape in zip(unpack(double.left, double.right, double.shapes), double.shapes, strict=True):
        blocks = torch.eye(shape.m_a).to(b) if a is None else a.square()
        rows = _bands(update.m, shape.m_b, shape.m_a)
        cols = _bands(update.n, shape.n_b, shape.n_a)
        squares = [
            blocks[of_a, of_a2].sum() * b[:of_b, :of_b2].square().sum()
            for of_a, of_b in rows
            for of_a2, of_b2 in cols
        ]
        norms.append(torch.stack(squares).sum().sqrt())
    return torch.stack(norms) * double.weights.abs()


def _bands(size: int, block: int, blocks: int) -> list[tuple[slice, int]]:
    """Splits a side into its whole blocks and the cut one: which of A's rows, and how many of B's."""
    whole = min(size // block, blocks)
    bands = [(slice(whole), block)]
    if whole < blocks and size % block:
        bands.append((slice(whole, whole + 1), size % block))
    return bands


def inner_product(first: Update, second: Update) -> float:
    """Returns ``⟨ΔW, ΔW'⟩ = Σ_jk ΔW_jk ΔW'_jk`` of two updates of one size, in float64.

    Of two LoRAs of small rank it is the sum of the entries of (lora_Bᵀ lora_B') ∘ (lora_A lora_A'ᵀ).

    Args:
        first: An update.
        second: Another one, of a layer of the same size.
    """
    one, other = _double(first), _double(second)
    if one.has_small_rank and other.has_small_rank:
        (a, b), (a2, b2) = lora_factors(*one), lora_factors(*other)
        return float(((b.T @ b2) * (a @ a2.T)).sum())  # (R, R')
    return float((delta_weight(*one) * delta_weight(*other)).sum())  # (m, n)


def _is_product(update: Update) -> bool:
    """Whether it is one A ⊗ B of which nothing is cut."""
    (first, *more) = update.shapes
    return not more and first.rows <= update.m and first.cols <= update.n


def _double(update: Update) -> Update:
    return update._replace(
        weights=update.weights.detach().double(),
        left=update.left.detach().double(),
        right=update.right.detach().double(),
    )
