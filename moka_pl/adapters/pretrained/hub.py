"""Folders on the hub: found by their id, and uploaded."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moka_pl.errors import AdapterError, one_line
from moka_pl.hub import ask_hub, cache_if_unreachable, hub_failure
from moka_pl.utils import expanded

#: ``owner/name``, as the hub allows them.
_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(name: str) -> bool:
    """Whether this is an id of the hub: ``owner/name`` where neither it nor ``owner`` is a path here."""
    folder = expanded(name)
    return bool(_ID.fullmatch(name)) and not folder.exists() and not folder.parent.exists()


def download(name: str, files: Sequence[str], revision: str | None = None) -> Path:
    """Downloads some files of one commit into the hub cache and returns their folder.

    Without a network the cached ones are taken.

    Args:
        name: A hub id.
        files: Names of the files, all of which must be there.
        revision: Branch, tag or commit.

    Raises:
        AdapterError: If the hub has no such files or refuses them, or they are neither cached nor in reach.
    """
    from huggingface_hub import hf_hub_download

    with cache_if_unreachable() as reason, _explained(name, _reading(name, files), reason):
        folder = Path(hf_hub_download(name, files[0], revision=revision)).parent
        for file in files[1:]:  # of the same commit, though somebody may be uploading another one
            hf_hub_download(name, file, revision=folder.name)
    return folder


def upload(
    folder: Path,
    name: str,
    files: Sequence[str],
    private: bool | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> str:
    """Uploads some files of a folder and returns the address of the commit.

    Args:
        folder: The folder.
        name: The id on the hub; a repository is made if there is none.
        files: Names of the files.
        private: Whether a new repository is private; None is the owner's default.
        token: A token that may write; None is the one that is logged in.
        options: Further ones of ``huggingface_hub.HfApi.upload_folder``.

    Raises:
        AdapterError: If the hub cannot be reached or refuses the upload.
    """
    from huggingface_hub import HfApi

    with _explained(name, _writing(name)):
        ask_hub()
        api = HfApi(token=token)
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=str(folder), allow_patterns=list(files), **options
        )
    return str(commit.commit_url)


@contextmanager
def _explained(name: str, messages: dict[str, str], reason: Exception | None = None) -> Iterator[None]:
    """Runs the body; turns errors of the hub client into one line with a remedy.

    Args:
        name: The hub id.
        messages: By what an error means.
        reason: Why the hub was not asked at all.
    """
    try:
        yield
    except Exception as raised:  # the transport's own errors differ between versions of its client
        error = raised if reason is None or hub_failure(raised) != "offline" else reason
        kind = hub_failure(error)
        if kind == "malformed":
            raise AdapterError(f"{name!r} is no hub id ({one_line(error)}); give owner/name") from error
        raise AdapterError(messages.get(kind, messages["other"]).format(one_line(error))) from error


def _reading(name: str, files: Sequence[str]) -> dict[str, str]:
    nowhere = f"{name} is no folder here and not in the hub cache, and"
    return {
        "offline": f"{nowhere} HF_HUB_OFFLINE is set; unset it, or give the path of an adapter directory",
        "unreachable": f"{nowhere} the hub cannot be reached ({{}}); connect to the network, or give the "
        "path of an adapter directory",
        "denied": f"{name} is no folder here, and on the hub gated, private or missing: accept its terms "
        "there, then log in with 'hf auth login' (or set HF_TOKEN); otherwise check the spelling",
        "no file": f"{name} is on the hub but is no adapter directory: it lacks {' or '.join(files)}",
        "missing": f"no folder {name} here, and no such model or revision on the hub; check the spelling, "
        "and log in with 'hf auth login' if it is private",
        "other": f"{name} cannot be downloaded: {{}}",
    }


def _writing(name: str) -> dict[str, str]:
    failed = f"{name} cannot be uploaded:"
    return {
        "offline": f"{failed} HF_HUB_OFFLINE is set; unset it",
        "unreachable": f"{failed} the hub cannot be reached ({{}}); connect to the network",
        "denied": f"{failed} the hub denies it; log in with 'hf auth login' (or set HF_TOKEN) by a token "
        "that may write there",
        "missing": f"{failed} no such owner or revision on the hub; check the spelling",
        "other": f"{failed} {{}}",
    }
