"""What surrounds every call of a transformers loader: one error in place of many, and no needless bars."""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager

from moka_pl.errors import BackboneError


@contextmanager
def loading(name: str) -> Iterator[None]:
    """Runs the body; what transformers raises in it becomes one line that names the model.

    Args:
        name: The model, as the user gave it.

    Raises:
        BackboneError: If a file is missing, damaged or of an unknown kind, or the memory does not suffice.
    """
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # tokenizers raises Exception itself, and safetensors and pyo3 their own kinds
        raise BackboneError(f"{name} cannot be loaded: {one_line(error)}") from error


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Runs the body with or without transformers' progress bars, and leaves the user's setting as it was.

    Args:
        show: False silences the bars; True leaves them as the user has set them.
    """
    from transformers.utils import logging

    if show or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def one_line(error: BaseException) -> str:
    """The message of an error as one line of bounded length."""
    return textwrap.shorten(str(error) or type(error).__name__, 300, placeholder=" …")
