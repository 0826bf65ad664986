"""One look at the model hub before anything is downloaded, and its refusals in one message."""

import os

from moka_pl.errors import BackboneError

_TIMEOUT = 15  # seconds for the one request


def reach_model(name: str, revision: str | None = None) -> bool:
    """Checks that a hub model can be had.

    Args:
        name: Hub id.
        revision: Branch, tag or commit.

    Returns:
        True if the hub answered; False if it cannot be reached but the model lies in the local hub cache.

    Raises:
        BackboneError: If the model does not exist, is gated or private, or can neither be reached nor lies
            in the cache.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str)
        if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
            raise OSError("HF_HUB_OFFLINE is set")
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=_TIMEOUT)
    except HFValidationError as error:
        raise BackboneError(f"{name!r} is neither a folder nor a hub id: {error}") from error
    except Exception as error:  # the transport's own errors differ between versions of its client
        if cached:
            return False
        raise explain(name, error) from error
    return True


def explain(name: str, error: BaseException) -> BackboneError:
    """Turns a failure of the hub's client into one message that says what to do.

    Args:
        name: Hub id.
        error: What the client raised.

    Returns:
        The error to raise.
    """
    kinds = {kind.__name__ for kind in type(error).__mro__}
    status = getattr(getattr(error, "response", None), "status_code", None)
    if "GatedRepoError" in kinds or status in (401, 403):
        return BackboneError(
            f"{name} is gated, private, or does not exist: accept its licence on its model page, then log in "
            "with 'hf auth login' (or set HF_TOKEN); otherwise check the spelling"
        )
    if "RepositoryNotFoundError" in kinds or "RevisionNotFoundError" in kinds or status == 404:
        return BackboneError(
            f"no model (or revision) named {name!r} is on the hub, nor a folder of that name here; check the "
            "spelling, and log in with 'hf auth login' if it is private"
        )
    return BackboneError(
        f"{name} is not in the hub cache and the hub cannot be reached ({error}); connect to the network, or "
        "give a local folder as backbone.name"
    )
