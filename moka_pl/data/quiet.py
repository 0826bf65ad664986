"""Progress bars only where there is something to wait for."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def progress_bars(show: bool) -> Iterator[None]:
    """Run the body with or without the progress bars of `datasets`, and leave the user's setting as it was.

    Args:
        show: False silences the bars; True leaves them as the user has set them.
    """
    from datasets import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    if show or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
