"""Chooses filters from a gradient: the shapes whose Kronecker products capture most of it.

At ΔW = 0 a step along ``−∂L/∂W`` lowers the loss fastest. A component can take the part of that step that a
Kronecker product of its shape can hold; how much that is, the rearrangement of Van Loan and Pitsianis tells
for any shape without training (:mod:`moka_pl.adapters.filter_search.nearest`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moka_pl.adapters.filter_search.gradients import MEMORY, linear_layers, weight_gradients
from moka_pl.adapters.filter_search.nearest import captured_share, nearest_products
from moka_pl.adapters.filters import divisors, filter_shapes, listed
from moka_pl.errors import ConfigError
from moka_pl.ops.kronecker import delta_weight
from moka_pl.ops.layout import Shape, group_equal, pack

#: Shapes of a layer that are fitted again to what earlier components leave; the others are ranked once.
SHORTLIST = 24


def candidate_shapes(
    m: int, n: int, largest: int | None = None, identities: bool = True
) -> tuple[Shape, ...]:
    """Returns all shapes that divide an m × n layer evenly, with at most ``largest`` parameters.

    Args:
        m: Output features.
        n: Input features.
        largest: Maximum parameters of a shape; None is four times the cheapest dense pair, 8·√(mn).
        identities: Include block-diagonal shapes, ``I_k ⊗ B``.

    Returns:
        The shapes, without those that are ordinary matrices (a factor of one entry) and with outer products
        in one order only (``m×1 ⊗ 1×n`` and ``1×n ⊗ m×1`` are the same matrices).

    Raises:
        ConfigError: If none is that small.
    """
    limit = int(8 * math.sqrt(m * n)) if largest is None else largest
    pairs = [Shape(a, p, m // a, n // p) for a in divisors(m) for p in divisors(n)]
    shapes = [s for s in pairs if min(s.m_a * s.n_a, s.m_b * s.n_b) > 1 and s[:4] != (1, n, m, 1)]
    if identities:
        shapes += [
            Shape(k, k, m // k, n // k, identity=True) for k in divisors(math.gcd(m, n)) if 1 < k < max(m, n)
        ]
    small = tuple(s for s in shapes if s.num_parameters <= limit)
    if not small:
        raise ConfigError(
            f"every Kronecker shape of a {m} × {n} layer has more than {limit} parameters; raise the limit"
        )
    return small


def choose_shapes(
    gradient: Tensor, components: int, parameters: int, shapes: Sequence[Shape] | None = None
) -> list[Shape]:
    """Chooses shapes for one layer within a budget, by matching pursuit on its gradient.

    Each component in turn takes the shape with the most captured energy of what the earlier ones leave, over
    ``parameters of the shape + fair share``, where the fair share is the budget that is left divided by the
    components that are left. Energy per parameter alone would fill the r places with tiny shapes and leave
    most of the budget: the fair share is the price of a place. What a small shape saves goes to later ones.

    Args:
        gradient: ∂L/∂W, shape (m, n).
        components: r.
        parameters: Budget of the factors' entries of this layer.
        shapes: Candidates; default :func:`candidate_shapes`.

    Returns:
        r shapes, in the order in which they were chosen.

    Raises:
        ConfigError: If the budget is too small for r components of the smallest candidate.
    """
    m, n = gradient.shape
    offered = candidate_shapes(m, n) if shapes is None else tuple(dict.fromkeys(shapes))
    least = min(shape.num_parameters for shape in offered)
    if components * least > parameters:
        raise ConfigError(
            f"a budget of {parameters} parameters is too small for {components} components of a {m} × {n} "
            f"layer, whose smallest shape has {least}; raise budget or lower components"
        )
    # A larger one would leave too little for the others.
    offered = tuple(s for s in offered if s.num_parameters <= parameters - (components - 1) * least)
    energies = _shortlist(gradient, offered, parameters / components)
    chosen: list[Shape] = []
    residual = gradient
    for places in range(components, 0, -1):
        affordable = [s for s in energies if s.num_parameters <= parameters - (places - 1) * least]
        shape, product = _take_best(residual, affordable, energies, parameters / places)
        residual = residual - product
        parameters -= shape.num_parameters
        chosen.append(shape)
    return chosen


def _shortlist(gradient: Tensor, offered: Sequence[Shape], fair_share: float) -> dict[Shape, float]:
    """Returns the shapes worth fitting again, with the energy that one product of each captures."""
    shares = {shape: captured_share(gradient, shape) for shape in offered}
    ranked = sorted(offered, key=lambda shape: -shares[shape] / (shape.num_parameters + fair_share))
    # The smallest is what the last components may still afford.
    short = [*ranked[:SHORTLIST], min(offered, key=lambda shape: shape.num_parameters)]
    whole = float(gradient.square().sum())
    return {shape: shares[shape] * whole for shape in short}


def _take_best(
    residual: Tensor, affordable: Sequence[Shape], energies: dict[Shape, float], fair_share: float
) -> tuple[Shape, Tensor]:
    """Finds the best shape for a residual, and its product, (m, n); updates ``energies`` on the way."""

    def worth(shape: Shape) -> float:
        return energies[shape] / (shape.num_parameters + fair_share)

    best: tuple[float, Shape, Tensor] | None = None
    for shape in sorted(affordable, key=worth, reverse=True):
        # The energies are those of earlier residuals and hardly ever grow: no later shape can be better.
        if best is not None and worth(shape) < best[0]:
            break
        pairs, captured = nearest_products(residual, shape)
        energies[shape] = float(captured[0])
        if best is None or worth(shape) > best[0] * (1 + 1e-6):
            product = delta_weight(residual.new_ones(1), *pack(pairs), (shape,), *residual.shape)  # (m, n)
            best = worth(shape), shape, product
    assert best is not None
    return best[1:]


def layer_budgets(
    model: nn.Module, names: Sequence[str], components: int, parameters: int | None = None
) -> dict[str, int]:
    """Shares a budget of factors' entries among layers as ``diverse`` would.

    Args:
        model: The model.
        names: The layers to adapt.
        components: r of every layer.
        parameters: Budget of all layers; None is what ``diverse`` takes.
    """
    usual = {
        name: sum(
            shape.num_parameters
            for shape in filter_shapes("diverse", components, layer.out_features, layer.in_features)
        )
        for name, layer in linear_layers(model, names).items()
    }
    scale = 1.0 if parameters is None else parameters / sum(usual.values())
    return {name: int(scale * entries) for name, entries in usual.items()}


@torch.no_grad()
def choose_within(
    gradient: Tensor, components: int, parameters: int, identities: bool = False
) -> list[Shape]:
    """Chooses shapes (:func:`choose_shapes`) among all that a layer's budget suggests.

    Those are the even ones of up to a component's share, and for layers that divide badly ``diverse``'s own.

    Args:
        gradient: ∂L/∂W, shape (m, n).
        components: r.
        parameters: Budget of the layer.
        identities: Offer block-diagonal components, too.

    Raises:
        ConfigError: If the budget is too small.
    """
    m, n = gradient.shape
    largest = max(int(8 * math.sqrt(m * n)), parameters // components)
    even = candidate_shapes(m, n, largest, identities)
    usual = filter_shapes("diverse", components, m, n)
    return choose_shapes(gradient, components, parameters, (*even, *usual))


def initial_left_factors(gradient: Tensor, shapes: Sequence[Shape]) -> list[Tensor | None]:
    """Makes left factors along the gradient: A_i from the nearest products, with the usual start's size.

    With the right factors at zero, ΔW = 0 still, and the first step of each B_i goes along
    ``R(−∂L/∂W)ᵀ vec(A_i)``, which this A_i makes as large as a unit vector can. (The sign of A_i is that of
    its B_i, and does not matter.) Components of one shape get the first, second, … singular vectors of R.

    Returns:
        A_i, (m_a, n_a), or None for an identity; with the norm √(m_a / 3) that Kaiming-uniform entries have
        on average. Where the gradient, (m, n), has nothing (left) for a component, None stands, too: keep
        its random start.
    """
    factors: list[Tensor | None] = [None] * len(shapes)
    whole = gradient.square().sum()
    for shape, numbers in group_equal(shapes).items():
        pairs, energies = nearest_products(gradient, shape, len(numbers))
        usable = (energies > 1e-12 * whole).tolist()
        for number, (left, _), is_usable in zip(numbers, pairs, usable, strict=False):
            if is_usable and left is not None:
                factors[number] = left * math.sqrt(shape.m_a / 3)
    return factors


def choose_filters(
    model: nn.Module,
    names: Sequence[str],
    batches: Sequence[Any],
    loss: Callable[[Any], Tensor],
    components: int = 10,
    parameters: int | None = None,
    identities: bool = False,
    memory: int = MEMORY,
) -> Iterator[tuple[str, list[list[int]], float]]:
    """Chooses the filters of every layer from the gradient of a few batches.

    Layers share the budget as ``diverse`` would share it; within a layer :func:`choose_shapes` decides.

    Args:
        model: The frozen model, without adapters.
        names: Layers to adapt, as :func:`moka_pl.adapters.find_targets` gives them.
        batches: A few batches.
        loss: Maps a batch to the scalar loss.
        components: r of every layer.
        parameters: Budget of all factors' entries; default what ``diverse`` takes.
        identities: Offer block-diagonal components, too. (Layers with both kinds have no fused kernels.)
        memory: Bytes of gradients to hold at once.

    Yields:
        Name, filters as a configuration lists them, and :func:`captured_share` of the first shape.

    Raises:
        ConfigError: If the budget is too small.
    """
    budgets = layer_budgets(model, names, components, parameters)
    for name, gradient in weight_gradients(model, names, batches, loss, memory):
        chosen = choose_within(gradient, components, budgets[name], identities)
        yield name, [listed(shape) for shape in chosen], captured_share(gradient, chosen[0])
