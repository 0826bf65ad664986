"""Synthetic teachers: does a mixture of Kronecker adapters find the structure that is there?

A frozen layer ``y = W x`` is to become ``y = (W + ΔW*) x`` on random inputs x ~ N(0, I), where ΔW* has a
structure that one or some of the offered components can hold exactly. W cancels in the loss
``mean_t ‖(ΔW − ΔW*) x_t‖² / m``, so that it is left out here. Many runs (seeds × learning rates) are trained
at once, as one batch of matrices.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moka_pl.adapters.filter_search.search import initial_left_factors
from moka_pl.ops.layout import Shape

#: Side of the square layer, and what is offered to it: the diverse shapes, blocks, and two outer products.
SIDE = 64
OFFERED = (
    Shape(8, 8, 8, 8),
    Shape(4, 16, 16, 4),
    Shape(16, 4, 4, 16),
    Shape(2, 32, 32, 2),
    Shape(32, 2, 2, 32),
    Shape(4, 4, 16, 16, identity=True),
    Shape(8, 8, 8, 8, identity=True),
    Shape(16, 16, 4, 4, identity=True),
    Shape(64, 1, 1, 64),
    Shape(64, 1, 1, 64),
)

#: Components that make up each teacher, by their numbers in ``OFFERED``, and the same energy of each part.
TEACHERS: dict[str, tuple[int, ...]] = {
    "kronecker 4×16 ⊗ 16×4": (1,),
    "blocks I8 ⊗ 8×8": (6,),
    "low rank (2)": (8, 9),
    "mixture": (2, 7, 8),
}
#: Teachers that no few products hold: of rank 16, and without structure.
HARDER: dict[str, tuple[Shape, ...]] = {"low rank (16)": (OFFERED[8],) * 16, "unstructured": ()}


def teacher(parts: Sequence[Shape], side: int, seed: int) -> Tensor:
    """Draws ΔW* as a sum of random products, each of energy m / number of parts (outputs of variance 1).

    Args:
        parts: Shapes of the products; they cover the layer exactly. Without any, all entries are random.
        side: m = n.
        seed: Seed of the factors.

    Returns:
        ΔW*, shape (m, m).
    """
    generator = torch.Generator().manual_seed(seed)
    total = torch.zeros(side, side)
    if not parts:
        total = torch.randn(side, side, generator=generator) / math.sqrt(side)
    for shape in parts:
        size = shape.m_a, shape.n_a
        left = torch.eye(shape.m_a) if shape.identity else torch.randn(size, generator=generator)
        product = torch.kron(left, torch.randn(shape.m_b, shape.n_b, generator=generator))
        total += product * math.sqrt(side / len(parts)) / product.norm()
    return total


@dataclass
class Runs:
    """What S runs of one teacher became.

    Attributes:
        gates: α over time, (points, S, r).
        steps: The step of each point.
        energy: ``‖s α_i A_i ⊗ B_i‖²`` of every component at the end, (S, r).
        error: ``‖ΔW − ΔW*‖² / ‖ΔW*‖²`` at the end, (S,).
    """

    gates: Tensor
    steps: list[int]
    energy: Tensor
    error: Tensor


class Students:
    """S layers' adapters as one: the start and the update are those of ``MokaLinear`` with softmax gates.

    Args:
        shapes: r shapes that cover the layer exactly.
        side: m = n.
        seeds: Seed of each run's factors.
    """

    def __init__(self, shapes: Sequence[Shape], side: int, seeds: Sequence[int]) -> None:
        self.shapes, self.side = tuple(shapes), side
        runs, r = len(seeds), len(shapes)
        self.left: list[Tensor | None] = []
        self.right: list[Tensor] = []
        self.logits = torch.zeros(runs, r, requires_grad=True)
        generators = [torch.Generator().manual_seed(10_000 + seed) for seed in seeds]
        for shape in shapes:
            # Kaiming-uniform with a = √5 is uniform within 1 / √n_a.
            bound = 1 / math.sqrt(shape.n_a)
            drawn = [torch.rand(shape.m_a, shape.n_a, generator=g) * 2 * bound - bound for g in generators]
            self.left.append(None if shape.identity else torch.stack(drawn).requires_grad_())  # (S, m_a, n_a)
            self.right.append(torch.zeros(runs, shape.m_b, shape.n_b, requires_grad=True))  # (S, m_b, n_b)

    def parameters(self) -> list[Tensor]:
        """All trained tensors, each with a leading dimension of runs."""
        return [self.logits, *self.right, *(left for left in self.left if left is not None)]

    def start_along(self, gradients: Tensor) -> None:
        """Starts the left factors along each run's gradient ∂L/∂W, (S, m, n); ΔW stays 0."""
        with torch.no_grad():
            for run, gradient in enumerate(gradients):
                starts = initial_left_factors(gradient, self.shapes)
                for left, start in zip(self.left, starts, strict=True):
                    if left is not None and start is not None:
                        left[run] = start

    def delta(self) -> Tensor:
        """ΔW of every run with s = r, (S, m, n)."""
        weights = self.logits.softmax(1) * len(self.shapes)  # (S, r)
        runs = len(weights)
        total: Tensor | float = 0.0
        for i, (shape, left, right) in enumerate(zip(self.shapes, self.left, self.right, strict=True)):
            scaled = right * weights[:, i, None, None]  # (S, m_b, n_b)
            if left is None:
                part = torch.eye(shape.m_a)[None, :, None, :, None] * scaled[:, None, :, None, :]
            else:
                part = left[:, :, None, :, None] * scaled[:, None, :, None, :]  # (S, m_a, m_b, n_a, n_b)
            total = total + part.reshape(runs, self.side, self.side)
        assert isinstance(total, Tensor)
        return total

    def energies(self) -> Tensor:
        """``‖s α_i A_i ⊗ B_i‖²`` of every component, (S, r)."""
        weights = self.logits.softmax(1) * len(self.shapes)
        norms = []
        for shape, left, right in zip(self.shapes, self.left, self.right, strict=True):
            size = right.square().sum((1, 2))
            norms.append(size * (shape.m_a if left is None else left.square().sum((1, 2))))
        return torch.stack(norms, 1) * weights.square()


def correlation(side: int) -> Tensor:
    """A matrix M, (n, n), for inputs ``M x`` of energy n whose k-th direction has a size as 1 / k."""
    generator = torch.Generator().manual_seed(30_000)
    directions: Tensor = torch.linalg.qr(torch.randn(side, side, generator=generator)).Q
    sizes = torch.arange(1, side + 1) ** -1.0  # (n,)
    sizes = sizes * math.sqrt(side) / sizes.square().sum().sqrt()
    return directions @ torch.diag(sizes)


def first_gradients(
    targets: Tensor, seeds: Sequence[int], tokens: int, mixing: Tensor | None = None
) -> Tensor:
    """∂L/∂W at ΔW = 0 of each run on inputs of its own: ``−2 ΔW* Σ_t x_t x_tᵀ / (m T)``.

    Args:
        targets: ΔW* of every run, (S, m, n).
        seeds: Seed of every run's inputs.
        tokens: Number T of inputs.
        mixing: Inputs are M x with this M; None is the identity.

    Returns:
        The gradients, (S, m, n).
    """
    gradients = []
    for target, seed in zip(targets, seeds, strict=True):
        x = torch.randn(tokens, target.shape[1], generator=torch.Generator().manual_seed(20_000 + seed))
        x = x if mixing is None else x @ mixing.mT  # (T, n)
        gradients.append(-2 * target @ (x.mT @ x) / (len(target) * tokens))
    return torch.stack(gradients)


def train(
    students: Students,
    targets: Tensor,
    rates: Sequence[float],
    steps: int,
    tokens: int,
    points: int = 25,
    mixing: Tensor | None = None,
) -> Runs:
    """Trains every run with Adam at its own learning rate, with a cosine to zero.

    Args:
        students: The adapters.
        targets: ΔW* of every run, (S, m, n).
        rates: Learning rate of every run, S.
        steps: Optimizer steps.
        tokens: Random inputs a step; all runs see the same.
        points: Number of steps at which gates are kept.
        mixing: Inputs are M x with this M; None is the identity. The error is then that of the outputs.

    Returns:
        What became of them.
    """
    parameters = students.parameters()
    rate = torch.tensor(rates)
    moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in parameters]
    generator = torch.Generator().manual_seed(0)
    gates, kept = [], []
    for step in range(steps + 1):
        if step % max(1, steps // points) == 0 or step == steps:
            gates.append(students.logits.detach().softmax(1))
            kept.append(step)
        if step == steps:
            break
        x = torch.randn(students.side, tokens, generator=generator)
        x = x if mixing is None else mixing @ x  # (n, T)
        missing = (students.delta() - targets) @ x  # (S, m, T)
        loss = missing.square().mean((1, 2)).sum()  # a sum: each run has gradients of its own
        gradients = torch.autograd.grad(loss, parameters)
        decay = 0.5 * (1 + math.cos(math.pi * step / steps))
        with torch.no_grad():
            for p, g, (first, second) in zip(parameters, gradients, moments, strict=True):
                first.lerp_(g, 0.1)
                second.lerp_(g.square(), 0.001)
                size = (second / (1 - 0.999 ** (step + 1))).sqrt_().add_(1e-8)
                each = (rate * decay / (1 - 0.9 ** (step + 1))).view(-1, *[1] * (p.dim() - 1))
                p -= each * first / size
    with torch.no_grad():
        energy = students.energies()
        missing, whole = students.delta() - targets, targets
        if mixing is not None:
            missing, whole = missing @ mixing, whole @ mixing
        error = missing.square().sum((1, 2)) / whole.square().sum((1, 2))
    return Runs(torch.stack(gates), kept, energy, error)


def of_right_shapes(right: Sequence[int], shapes: Sequence[Shape]) -> list[int]:
    """Numbers of all components with a shape of the right ones: equal shapes can stand for each other."""
    wanted = {shapes[i] for i in right}
    return [i for i, shape in enumerate(shapes) if shape in wanted]


def found_parts(scores: Tensor, right: Sequence[int], shapes: Sequence[Shape] = OFFERED) -> Tensor:
    """Whether the components with the largest scores have exactly the right shapes, (S,).

    Args:
        scores: Scores of the components, (S, r).
        right: Numbers of the right components.
        shapes: Shapes of all components; equal ones can stand for each other.
    """
    kinds = torch.tensor([list(shapes).index(shape) for shape in shapes])  # (r,)
    top = kinds[scores.topk(len(right), 1).indices].sort(1).values  # (S, number of right ones)
    return (top == kinds[list(right)].sort().values).all(1)
