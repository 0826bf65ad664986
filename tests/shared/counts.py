"""How many entries the factors of some layers have."""

from moka_pl.adapters.filters import Filters, filter_shapes


def factor_entries(layers: list[tuple[int, int]], filters: Filters, components: int) -> int:
    """Entries of all factors of layers of these sizes (m, n)."""
    return sum(shape.num_parameters for m, n in layers for shape in filter_shapes(filters, components, m, n))
