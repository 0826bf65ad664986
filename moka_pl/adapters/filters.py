"""Filters: which factor shapes the components of a layer take, and how many parameters that is.

For a layer with m output and n input features, a component is ``A ⊗ B`` with A of m_a × n_a and B of
m_b × n_b entries. Both factors should hold about √(mn) entries: that is the cheapest way to cover m × n.

Source: MoKA, arXiv 2508.03527, sections on filters and MoKA_s.
"""

import math
from collections.abc import Mapping, Sequence
from functools import cache

from moka_pl.adapters.schema import shown
from moka_pl.errors import ConfigError
from moka_pl.ops.layout import Shape

#: m_a / n_a of the diverse filters, relative to the layer's own m / n; ten components use each one twice.
ASPECT_RATIOS = (1.0, 1 / 4, 4.0, 1 / 16, 16.0)

#: MoKA_s aims at this share of the diverse filters' entries (the paper's 4.2 M against 5.2 M).
PRIME_BUDGET = 0.8

#: More components are a mistake: a hundred times the paper's.
MAX_COMPONENTS = 1024

#: ``filters: servable``: the rank of a component unless ``rank`` says another, and the most of a layer
#: (vLLM's largest ``max-lora-rank``).
DEFAULT_RANK, MAX_RANK = 16, 512

#: Factors may hold as many entries as their layer, and in small layers as many as this.
_SMALL_LAYER = 2**16

#: Filters that a training run chooses from its first batches (:mod:`moka_pl.training.auto_filters`).
AUTO = "auto"

#: Filters whose components are LoRAs of a given rank.
SERVABLE = "servable"

#: What to do about ``filters: auto`` without a run; ends the sentence of an error.
WITHOUT_TRAINER = (
    "set filters to a mapping of layers to lists of shapes (moka_pl.adapters.filter_search.choose_filters "
    "makes one)"
)

Filters = str | Sequence[Sequence[int]]


def filter_shapes(
    filters: Filters, components: int, m: int, n: int, rank: int | None = None
) -> tuple[Shape, ...]:
    """Returns the factor shapes of all components for an m × n layer.

    Args:
        filters: ``"diverse"`` (five aspect ratios in turn), ``"square"`` (one shape for all), ``"prime"``
            (MoKA_s: identity left factor, right factors with different prime sides), ``"servable"`` (each
            component exactly a LoRA of rank ``rank``), or a list with one entry for all components or one
            each: ``[m_a, n_a]``, ``[m_a, n_a, m_b, n_b]``, or ``[k, m_b, n_b]`` for an identity of size k on
            the left.
        components: r, the number of components.
        m: Output features.
        n: Input features.
        rank: Of ``servable`` only, the rank of one component; None is ``DEFAULT_RANK``.

    Raises:
        ConfigError: For an unknown name, a wrong count, sizes that are not positive whole numbers, or a rank
            that the layer cannot have.
    """
    if components < 1:
        raise ConfigError(f"components must be at least 1, not {components}")
    if components > MAX_COMPONENTS:
        raise ConfigError(f"components must be at most {MAX_COMPONENTS}, not {shown(components)}")
    if isinstance(filters, str):
        if filters == "diverse":
            return tuple(
                _aspect_shape(m, n, ASPECT_RATIOS[i % len(ASPECT_RATIOS)]) for i in range(components)
            )
        if filters == "square":
            return (_aspect_shape(m, n, 1.0),) * components
        if filters == "prime":
            return _prime_shapes(m, n, components)
        if filters == SERVABLE:
            return (_servable_shape(m, n, components, DEFAULT_RANK if rank is None else rank),) * components
        if filters == AUTO:
            raise ConfigError(f"filters: auto needs a training run; without a trainer, {WITHOUT_TRAINER}")
        raise ConfigError(
            f"unknown filters {shown(filters)}; choose one of diverse, square, prime, {SERVABLE}, {AUTO}, "
            "or give a list of [m_a, n_a], [m_a, n_a, m_b, n_b] or (identity left) [k, m_b, n_b]"
        )
    return _explicit_shapes(filters, components, m, n)


def check_size(shapes: Sequence[Shape], m: int, n: int) -> None:
    """Refuses components for an m × n layer that together hold more entries than the layer itself.

    Args:
        shapes: The components' shapes.
        m: Output features.
        n: Input features.

    Raises:
        ConfigError: Naming both sizes.
    """
    entries = sum(shape.num_parameters for shape in shapes)
    if entries > max(m * n, _SMALL_LAYER):
        raise ConfigError(
            f"{len(shapes)} components hold {entries:,} entries for a layer of {m} × {n} = {m * n:,}; "
            "set fewer components or smaller filters"
        )


def listed(shape: Shape) -> list[int]:
    """Returns a shape as it is written in a list of filters."""
    return [shape.m_a, shape.m_b, shape.n_b] if shape.identity else list(shape[:4])


def describe_filters(filters: "Filters | Mapping[str, Filters]") -> str:
    """Describes filters in a few words."""
    if isinstance(filters, Mapping):
        return f"listed by layer ({len(filters)} layers)"
    return filters if isinstance(filters, str) else str([list(sizes) for sizes in filters])


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Returns all divisors of a positive whole number, ascending."""
    low = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return tuple(sorted({*low, *(number // d for d in low)}))


@cache
def _aspect_shape(m: int, n: int, ratio: float) -> Shape:
    """Returns the shape with A near √m·√ratio × √n/√ratio, from divisors where near ones exist.

    Both factors then have √(mn) entries, and B has the inverse aspect ratio.
    """
    target_m, target_n = math.sqrt(m * ratio), math.sqrt(n / ratio)
    best: tuple[float, Shape] | None = None
    for m_a, m_b in _sides(m, target_m):
        for n_a, n_b in _sides(n, target_n):
            off = math.log(m_a / target_m) ** 2 + math.log(n_a / target_n) ** 2
            uneven = math.log(m_a * n_a / math.sqrt(m * n)) ** 2
            cost = off + uneven
            if best is None or cost < best[0] - 1e-9:
                best = (cost, Shape(m_a, n_a, m_b, n_b))
    assert best is not None
    return best[1]


def _sides(size: int, target: float) -> list[tuple[int, int]]:
    """Sides of A and B that give ``size``, A's within a factor of two of ``target``; else some that cover it.

    Where no divisor is near, B's side is a multiple of 8 if one is near that wastes no entry: rows of B can
    then be read in wide words.
    """
    close = [(d, size // d) for d in divisors(size) if target / 2 <= d <= target * 2]
    if close:
        return close
    right = size / target
    wide = [(math.ceil(size / b), b) for b in range(8, math.ceil(1.5 * right), 8) if b >= right / 1.5]
    wide = [(a, b) for a, b in wide if size > a * (b - 1)]
    if wide:
        return [min(wide, key=lambda sides: abs(math.log(sides[1] / right)))]
    left = min(max(1, round(target)), size)
    return [(left, math.ceil(size / left))]


def _prime_shapes(m: int, n: int, components: int) -> tuple[Shape, ...]:
    """Returns MoKA_s's shapes: I_k ⊗ B_i, the longer side of B_i another prime in every component.

    Different primes keep the block borders of different components from ever lining up. The primes are
    consecutive and then spread upwards, as large as the budget of ``PRIME_BUDGET`` times the entries of the
    diverse filters allows.
    """
    budget = PRIME_BUDGET * 2 * math.sqrt(m * n) * components
    primes = _primes_up_to(max(m, n, 40 * components))

    def affordable(indices: list[int]) -> bool:
        if indices[-1] >= len(primes) or primes[indices[-1]] > max(m, n):
            return False
        return sum(_prime_shape(m, n, primes[i]).num_parameters for i in indices) <= budget

    chosen = list(range(components))  # indices into primes
    while affordable(raised := [i + 1 for i in chosen]):
        chosen = raised
    for position in reversed(range(components)):
        raised = [*chosen]
        raised[position] += 1
        if raised[position] not in chosen and affordable(raised):
            chosen = raised
    return tuple(_prime_shape(m, n, primes[i]) for i in chosen)


def _prime_shape(m: int, n: int, prime: int) -> Shape:
    """Returns I_k ⊗ B with the prime on the longer side of the layer and k blocks that cover it."""
    blocks = math.ceil(max(m, n) / prime)
    other = math.ceil(min(m, n) / blocks)
    if m == n:
        m_b = n_b = prime
    else:
        m_b, n_b = (prime, other) if m > n else (other, prime)
    return Shape(blocks, blocks, m_b, n_b, identity=True)


@cache
def _primes_up_to(limit: int) -> tuple[int, ...]:
    sieve = bytearray([1]) * (limit + 1)
    sieve[:2] = b"\0\0"
    for i in range(2, math.isqrt(limit) + 1):
        if sieve[i]:
            sieve[i * i :: i] = bytes(len(range(i * i, limit + 1, i)))
    return tuple(i for i, prime in enumerate(sieve) if prime)


def check_rank(rank: int, components: int) -> None:
    """Refuses ranks of servable components that no layer can have.

    Raises:
        ConfigError: If the rank is below 1, or all components together are above ``MAX_RANK``.
    """
    if rank < 1:
        raise ConfigError(f"rank must be at least 1, not {shown(rank)}")
    if rank > MAX_RANK:
        raise ConfigError(f"rank must be at most {MAX_RANK}, the largest that vLLM serves, not {shown(rank)}")
    if components * rank > MAX_RANK:
        most = MAX_RANK // components
        raise ConfigError(
            f"components × rank must be at most {MAX_RANK}, the largest rank that vLLM serves, not "
            f"{shown(components)} × {rank}; set components to at most {MAX_RANK // rank}"
            + (f", or rank to at most {most}" if most else "")
        )


def _servable_shape(m: int, n: int, components: int, rank: int) -> Shape:
    """Returns A (a × n/b) ⊗ B (m/a × b) with a·b = rank, of all splits the one with the fewest parameters.

    n/b and m/a are rounded up, so that the last block of columns and of rows may be partial. Columns cost no
    rank: ⌊n/b⌋ blocks are whole, at least the r·a that r components need, since n is at least r·rank. Rows
    cost none if the last block keeps at least r·b; other splits do not count. With a = 1 it always does.
    """
    check_rank(rank, components)
    if components * rank > min(m, n):
        most = min(m, n) // components
        remedy = f"set rank to at most {most}" if most else f"set at most {min(m, n)} components with rank 1"
        raise ConfigError(
            f"a layer of {m} × {n} has at most rank {min(m, n)}, not {components * rank} (components × rank "
            f"= {components} × {rank}); {remedy}, or add the layer to exclude_modules"
        )
    splits = [Shape(a, -(-n * a // rank), -(-m // a), rank // a) for a in divisors(rank)]
    kept = [s for s in splits if m - (s.m_a - 1) * s.m_b >= components * s.n_b]
    return min(kept, key=lambda shape: (shape.num_parameters, abs(shape.m_a - shape.n_b)))


def _explicit_shapes(filters: Sequence[Sequence[int]], components: int, m: int, n: int) -> tuple[Shape, ...]:
    if not isinstance(filters, (list, tuple)):
        raise ConfigError(
            f"filters must be a name, a list or a mapping of layers to lists, not {shown(filters)}"
        )
    if len(filters) not in (1, components):
        raise ConfigError(
            f"filters lists {len(filters)} shapes for {components} components; "
            "list one shape for all or one for each"
        )
    shapes = []
    for sizes in filters:
        if (
            not isinstance(sizes, (list, tuple))
            or len(sizes) not in (2, 3, 4)
            or any(not isinstance(s, int) or isinstance(s, bool) or s < 1 for s in sizes)
        ):
            raise ConfigError(
                f"filter {shown(sizes)} is not [m_a, n_a], [m_a, n_a, m_b, n_b] or [k, m_b, n_b] "
                "in positive whole numbers"
            )
        identity = len(sizes) == 3
        m_a, n_a = (sizes[0], sizes[0]) if identity else sizes[:2]
        m_b, n_b = sizes[-2:] if len(sizes) > 2 else (math.ceil(m / m_a), math.ceil(n / n_a))
        if max(m_a, m_b) > m or max(n_a, n_b) > n:
            raise ConfigError(
                f"filter {shown(list(sizes))} has a factor larger than the layer ({m} outputs, {n} inputs)"
            )
        shapes.append(Shape(m_a, n_a, m_b, n_b, identity))
    return tuple(shapes * components if len(shapes) == 1 else shapes)
