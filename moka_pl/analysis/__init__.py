"""What an update is made of: nearest Kronecker products, spectra, and filters chosen from gradients."""

from moka_pl.analysis.choice import candidate_shapes, choose_filters, choose_shapes
from moka_pl.analysis.nearest import (
    captured_share,
    nearest_mixture,
    nearest_products,
    rearrange,
    restore,
)
from moka_pl.analysis.spectrum import Spectrum, model_spectra, spectrum

__all__ = [
    "Spectrum",
    "candidate_shapes",
    "captured_share",
    "choose_filters",
    "choose_shapes",
    "model_spectra",
    "nearest_mixture",
    "nearest_products",
    "rearrange",
    "restore",
    "spectrum",
]
