"""Asks the hub once, where its client would retry for half a minute, and tells what its errors mean."""

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from moka_pl.errors import one_line

HubFailure = Literal["offline", "denied", "no file", "missing", "malformed", "unreachable", "other"]

#: Seconds to connect, to read, to write, and to wait for a free connection, as httpx takes them.
_TIMEOUT: Any = (3.0, 15.0, 15.0, 15.0)
#: Seconds for which a hub out of reach is not asked again.
_SILENCE = 60.0

#: Until when the hub is not asked again, and why.
_silence: tuple[float, Exception] | None = None


def ask_hub(url: str | None = None) -> None:
    """Asks the hub for the head of a file, once; a hub that did not answer is not asked again for a minute.

    Args:
        url: Address of the file; None only looks whether the hub answers.

    Raises:
        Exception: Whatever the hub client raises; see :func:`hub_failure`.
    """
    global _silence
    from huggingface_hub import constants, get_hf_file_metadata

    if _silence is not None and time.monotonic() < _silence[0] and not constants.is_offline_mode():
        raise _silence[1].with_traceback(None)
    try:
        get_hf_file_metadata(url or constants.ENDPOINT, timeout=_TIMEOUT)
    except Exception as error:  # the transport's own errors differ between versions of its client
        _silence = (time.monotonic() + _SILENCE, error) if hub_failure(error) == "unreachable" else None
        raise
    _silence = None


@contextmanager
def cache_if_unreachable() -> Iterator[Exception | None]:
    """Runs the body in the hub's offline mode if the hub cannot be reached: from its cache, and at once.

    It yields why the hub is not asked, which is also that this mode is on already, or None.
    """
    reason: Exception | None = None
    failure: HubFailure | None = None
    try:
        ask_hub()
    except Exception as error:
        failure = hub_failure(error)
        reason = error if failure in ("unreachable", "offline") else None
    with offline_mode() if failure == "unreachable" else nullcontext():
        yield reason


def unasked(reason: Exception) -> tuple[str, str]:
    """Says why the hub is not asked, and what to do.

    Args:
        reason: What :func:`cache_if_unreachable` yielded.
    """
    if hub_failure(reason) == "offline":
        return "HF_HUB_OFFLINE is set", "unset it"
    return f"the hub cannot be reached ({one_line(reason)})", "connect to the network"


@contextmanager
def offline_mode() -> Iterator[None]:
    """Runs the body as with ``HF_HUB_OFFLINE``: the hub's client and ``datasets`` read their caches only."""
    from datasets import config  # imported in the body, it would stay offline
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, config.HF_HUB_OFFLINE = before


def hub_failure(error: BaseException) -> HubFailure:
    """Tells what an error of the hub client means, of whichever version and transport.

    ``denied`` is also what it answers for a repository that is missing, to who is not logged in; ``other`` is
    an answer that is none of these.
    """
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    # A download that nothing is cached of wraps the reason why the hub was not asked.
    while type(error).__name__ == "LocalEntryNotFoundError" and error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, HFValidationError):
        return "malformed"
    if isinstance(error, OfflineModeIsEnabled):
        return "offline"
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds or status in (401, 403):
        return "denied"
    if "EntryNotFoundError" in kinds and status == 404:
        return "no file"
    if "RepositoryNotFoundError" in kinds or "RevisionNotFoundError" in kinds or status == 404:
        return "missing"
    return "unreachable" if status is None else "other"
