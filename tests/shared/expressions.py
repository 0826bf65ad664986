"""Texts that patterns of layers may be."""

from hypothesis import strategies as st

from moka_pl.adapters.patterns import compile_pattern
from moka_pl.errors import AdapterError


def is_expression(text: str) -> bool:
    """Whether a text is a regular expression."""
    try:
        compile_pattern(text)
    except AdapterError:
        return False
    return True


def expressions(texts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Draws those of some texts that are regular expressions."""
    return texts.filter(is_expression)
