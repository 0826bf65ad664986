"""What TensorBoard's writer says when the disk is full: one line, with the file."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any


@contextmanager
def log_writers() -> Iterator[None]:
    """Names the file in errors of TensorBoard's writer, whose thread says nothing itself.

    The writer raises its thread's error in the main thread again, where it is told.
    """
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not (isinstance(args.exc_value, OSError) and _written_file(args.exc_traceback)):
            before(args)

    threading.excepthook = hook
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = _written_file(error.__traceback__)
        raise
    finally:
        threading.excepthook = before


def _written_file(traceback: TracebackType | None) -> str | None:
    """Returns the file that TensorBoard was writing to, by the innermost call that knows it."""
    file = None
    while traceback is not None:
        frame = traceback.tb_frame
        name = frame.f_locals.get("filename")
        if "tensorboard" in frame.f_globals.get("__name__", "") and isinstance(name, str | bytes):
            file = name.decode(errors="replace") if isinstance(name, bytes) else name
        traceback = traceback.tb_next
    return file
