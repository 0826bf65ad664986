"""Filters chosen from gradients: which shapes can express what a layer's weight wants to become."""

from moka_pl.adapters.filter_search.search import choose_filters

__all__ = ["choose_filters"]
