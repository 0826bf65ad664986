"""Looks a model up on the hub before a download, and explains failures."""

import fnmatch
from pathlib import Path

from moka_pl.errors import BackboneError, one_line
from moka_pl.hub import ask_hub, hub_failure
from moka_pl.utils import space_shortage

_TIMEOUT = 15  # seconds for the one request


def reach_model(name: str, revision: str | None = None) -> Path | None:
    """Returns None if the hub has a model, or if it cannot be reached, the model's folder in the hub cache.

    (Loaded by name, even with ``local_files_only``, transformers would still ask the hub, again and again.)

    Raises:
        BackboneError: If the model is missing, gated or private, or neither within reach nor in the cache.
    """
    from huggingface_hub import hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        ask_hub(hf_hub_url(name, "config.json", revision=revision))
    except HFValidationError as error:
        raise BackboneError(f"{name!r} is neither a folder nor a hub id: {one_line(error)}") from error
    except Exception as error:  # the transport's own errors differ between versions of its client
        if isinstance(cached, str):
            return Path(cached).parent
        raise _explain(name, error) from error
    return None


def check_download(name: str, revision: str | None = None) -> None:
    """Refuses a model whose weight files, as far as they are not there, do not fit into the hub cache.

    Raises:
        BackboneError: Naming what is needed and what is free.
    """
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT)
    except Exception:  # the download itself says what is wrong
        return
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    weights = fnmatch.filter(sizes, "model*.safetensors") or fnmatch.filter(sizes, "pytorch_model*.bin")
    there = {
        file
        for file in weights
        if isinstance(try_to_load_from_cache(name, file, revision=info.sha or revision), str)
    }
    folder = Path(constants.HF_HUB_CACHE)
    size = sum(sizes[file] for file in weights if file not in there and "/" not in file)
    if (shortage := space_shortage(folder, size)) is not None:
        raise BackboneError(
            f"{name} does not fit into the hub cache {folder}: {shortage}; free some space, or set "
            "HF_HUB_CACHE to a folder on another disk"
        )


def download_model(name: str, revision: str | None = None) -> Path:
    """Downloads the files of a model that transformers reads into the hub cache, and returns their folder.

    Raises:
        BackboneError: If they do not fit into it.
    """
    from huggingface_hub import snapshot_download

    check_download(name, revision)
    # Some models have their weights twice more, in other folders or under other names.
    kinds = ["model*.safetensors", "*.json", "*.model", "*.jinja"]
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=kinds, ignore_patterns="*/*"))
    if not any(folder.glob("*.safetensors")):
        snapshot_download(name, revision=revision, allow_patterns="pytorch_model*.bin")
    return folder


def _explain(name: str, error: BaseException) -> BackboneError:
    """Turns an error of the hub client into one that names the remedy."""
    match hub_failure(error):
        case "offline":
            reason = (
                "is not in the hub cache, and HF_HUB_OFFLINE is set; unset it, or set backbone.name to a "
            )
            return BackboneError(f"{name} {reason}local folder")
        case "denied":
            return BackboneError(
                f"{name} is gated, private or missing: accept the licence on its model page, then log in "
                "with 'hf auth login' (or set HF_TOKEN); otherwise check the spelling"
            )
        case "no file":
            return BackboneError(
                f"{name} is on the hub but is not a transformers model: it has no config.json; if it has "
                "GGUF files, download one and set backbone.name to its path"
            )
        case "missing":
            return BackboneError(
                f"no model (or revision) {name!r} on the hub, and no such local folder; check the spelling, "
                "and log in with 'hf auth login' if it is private"
            )
    return BackboneError(
        f"{name} is not in the hub cache and the hub cannot be reached ({one_line(error)}); connect to the "
        "network, or set backbone.name to a local folder"
    )
