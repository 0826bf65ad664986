"""Chooses filters from gradients: the shapes that best express the change a weight needs."""

from moka_pl.adapters.filter_search.search import choose_filters

__all__ = ["choose_filters"]
