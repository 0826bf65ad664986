"""A trained adapter in use: loads it with its base model, and generates texts."""

from moka_pl.inference.generation import Completion, complete, context_window, generate_texts, named_option
from moka_pl.inference.load import Preview, load_base, load_model

__all__ = [
    "Completion",
    "Preview",
    "complete",
    "context_window",
    "generate_texts",
    "load_base",
    "load_model",
    "named_option",
]
