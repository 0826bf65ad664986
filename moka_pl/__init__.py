"""Gated mixtures of Kronecker adapters (MoKA) for 4-bit LLaMA models, on PyTorch Lightning."""

from moka_pl.version import __version__

__all__ = ["__version__"]
