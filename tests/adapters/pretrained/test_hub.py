"""Adapters on the hub: found by their id and uploaded, with a hub that is a folder here."""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

import moka_pl
from moka_pl.adapters import MokaConfig, local_adapter, read_adapter
from moka_pl.backbone import BackboneConfig, load_backbone
from moka_pl.errors import AdapterError

# The client's transport library: its name differs between versions.
http = import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
NAME, COMMIT = "someone/adapter", "0123456789abcdef0123456789abcdef01234567"


def refusal(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = http.Request("HEAD", f"https://huggingface.co/{NAME}")
    return kind("a long\n\nmessage of the client", response=http.Response(status, request=request))


def wrapped(cause: Exception) -> errors.LocalEntryNotFoundError:
    """What a download raises where nothing is cached and the hub cannot be asked."""
    error = errors.LocalEntryNotFoundError("not cached")
    error.__cause__ = cause
    return error


FAILURES = {
    "gated": (refusal(errors.GatedRepoError, 403), "gated, private or missing: accept .* 'hf auth login'"),
    "absent": (refusal(errors.RepositoryNotFoundError, 404), "no folder someone/adapter here, .* spelling"),
    "no adapter": (
        refusal(errors.RemoteEntryNotFoundError, 404),
        "no adapter directory: it lacks adapter",
    ),
    "offline": (wrapped(errors.OfflineModeIsEnabled("offline")), "HF_HUB_OFFLINE is set; unset it"),
    "no network": (wrapped(http.ConnectError("[Errno -2] Name or service\nnot known")), "cannot be reached"),
    "the hub is down": (refusal(errors.HfHubHTTPError, 503), "downloaded: a long message of the client"),
    "malformed": (errors.HFValidationError("no '--'"), "'someone/adapter' is no hub id .* give owner/name"),
}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A hub in a folder; ``asked`` lists downloads, ``private`` new repositories; ``failure`` fails all."""
    hub = SimpleNamespace(folder=tmp_path / "hub", asked=[], private={}, failure=None)
    monkeypatch.chdir(tmp_path)

    def download(name: str, file: str, revision: str | None = None) -> str:
        hub.asked.append((name, file, revision))
        if hub.failure is not None:
            raise hub.failure
        if not (hub.folder / name / file).is_file():
            raise refusal(errors.RemoteEntryNotFoundError, 404)
        snapshot = tmp_path / "cache" / name.replace("/", "--") / COMMIT
        snapshot.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(hub.folder / name / file, snapshot / file))

    class Api:
        def __init__(self, token: str | None = None) -> None:
            self.token = token

        def create_repo(self, name: str, private: bool | None, exist_ok: bool) -> SimpleNamespace:
            if hub.failure is not None:
                raise hub.failure
            (hub.folder / name).mkdir(parents=True, exist_ok=exist_ok)
            hub.private[name] = private
            return SimpleNamespace(repo_id=name)

        def upload_folder(
            self, repo_id: str, folder_path: str, allow_patterns: list[str], **options: object
        ) -> SimpleNamespace:
            for pattern in allow_patterns:
                for file in Path(folder_path).glob(pattern):
                    shutil.copy(file, hub.folder / repo_id)
            hub.options = options
            return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/{COMMIT}")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return hub


@pytest.fixture
def model(randomize: Callable) -> torch.nn.Module:
    """A tiny model with random adapters."""
    base = load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).model
    randomize(moka_pl.attach(base, MokaConfig(components=2), base="tiny"))
    return base


def test_an_adapter_goes_to_the_hub_and_comes_back(hub, model, tmp_path: Path) -> None:
    model.save_pretrained("here")
    Path("here/notes.txt").write_text("not for others")
    address = moka_pl.push_to_hub("here", NAME, private=True, commit_message="First")
    assert address == f"https://hub/{NAME}/commit/{COMMIT}"
    assert hub.private == {NAME: True}
    assert hub.options == {"commit_message": "First"}
    uploaded = sorted(file.name for file in (hub.folder / NAME).iterdir())
    assert uploaded == ["README.md", "adapter_config.json", "adapter_model.safetensors"]

    folder = local_adapter(NAME, "v1")
    assert hub.asked == [
        (NAME, "adapter_config.json", "v1"),
        (NAME, "adapter_model.safetensors", COMMIT),  # of the commit that the first file was of
    ]
    assert read_adapter(NAME).base.name == "tiny"
    assert {file.name for file in folder.iterdir()} == set(uploaded) - {"README.md"}
    base = load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).model
    moka_pl.attach(base, NAME)
    ids = torch.arange(9)[None]
    assert torch.equal(base(ids).logits, model(ids).logits)


@pytest.mark.parametrize("older", [False, True])
def test_where_the_base_lies_is_not_uploaded(older: bool, hub, model, tmp_path: Path) -> None:
    private = tmp_path / "home" / "alice" / "secret-base"
    base = load_backbone(BackboneConfig("tiny", weights="random", quantization="none")).model
    moka_pl.attach(base, MokaConfig(components=2), base=str(private)).save_pretrained(tmp_path / "here")
    card = tmp_path / "here" / "README.md"
    assert "alice" not in card.read_text()
    assert "base_model" not in card.read_text()
    if older:
        card.write_text(f"---\nbase_model: {private}\ntags: [x]\n---\nfor {private}\n")
    moka_pl.push_to_hub(tmp_path / "here", NAME)
    uploaded = {file.name: file.read_bytes() for file in (hub.folder / NAME).iterdir()}
    assert len(uploaded) == 3
    assert not any(b"alice" in contents for contents in uploaded.values())
    assert b"base_model:" not in uploaded["README.md"]
    assert b"secret-base" in uploaded["README.md"]
    assert read_adapter(NAME).base.name == "secret-base"
    assert read_adapter(tmp_path / "here").base.name == str(private)


def test_a_model_uploads_its_adapter(hub, model) -> None:
    model.push_to_hub("me/mine", commit_message="Better", max_shard_size="1GB", tags=["x"])
    assert read_adapter("me/mine").base.name == "tiny"
    assert hub.options == {"commit_message": "Better"}
    model.save_pretrained("out", push_to_hub=True, repo_id="me/other")
    assert read_adapter("me/other").config == read_adapter("me/mine").config


@pytest.mark.parametrize("name", FAILURES)
def test_a_refused_download_is_explained(name: str, hub) -> None:
    hub.failure, message = FAILURES[name]
    with pytest.raises(AdapterError, match=message) as refused:
        moka_pl.load_model(NAME)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("failure", "message"),
    [
        (errors.OfflineModeIsEnabled("offline"), "me/x cannot be uploaded: HF_HUB_OFFLINE is set; unset it"),
        (refusal(errors.HfHubHTTPError, 401), "the hub denies it; log in with 'hf auth login'"),
        (refusal(errors.RepositoryNotFoundError, 404), "no such owner"),
        (http.ConnectError("unknown\nhost"), r"cannot be reached \(unknown host\); connect"),
        (refusal(errors.HfHubHTTPError, 409), "uploaded: a long message of the client"),
    ],
)
def test_a_refused_upload_is_explained(failure: Exception, message: str, hub, model) -> None:
    hub.failure = failure
    with pytest.raises(AdapterError, match=message):
        model.push_to_hub("me/x")


@pytest.mark.usefixtures("no_network")
def test_a_hub_out_of_reach_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    nowhere = r"someone/adapter is no folder .* the hub cannot be reached \(.*no network\); connect"
    with pytest.raises(AdapterError, match=nowhere):
        read_adapter(NAME)
    files = {"adapter_config.json": "{}", "adapter_model.safetensors": ""}
    folder = tmp_path / "hub" / "models--someone--adapter"
    (folder / "snapshots" / COMMIT).mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    for name, text in files.items():
        (folder / "snapshots" / COMMIT / name).write_text(text)
    assert local_adapter(NAME) == folder / "snapshots" / COMMIT


@pytest.mark.usefixtures("no_network")
def test_an_upload_does_not_wait_for_a_hub_out_of_reach(model) -> None:
    with pytest.raises(AdapterError, match=r"cannot be uploaded: the hub cannot be reached \(.*no network\)"):
        model.push_to_hub("me/x")


def test_an_unknown_home_folder_is_a_name_like_others(hub) -> None:
    with pytest.raises(AdapterError, match="no such folder"):
        read_adapter("~nobody-of-that-name/adapter")


def test_a_damaged_adapter_is_not_uploaded(hub, model) -> None:
    model.save_pretrained("here")
    file = Path("here/adapter_model.safetensors")
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(AdapterError, match="truncated or damaged"):
        moka_pl.push_to_hub("here", NAME)
    assert not hub.private


def test_paths_are_not_looked_up(hub, tmp_path: Path) -> None:
    Path("runs").mkdir()
    for path in ("runs/adapter", "./runs/adapter", str(tmp_path / "x"), "a/b/c", "~/adapter", "adapter"):
        with pytest.raises(AdapterError, match="no such folder"):
            read_adapter(path)
    assert not hub.asked
    with pytest.raises(AdapterError, match="runs is a path on this machine, without revision 'v1'"):
        local_adapter("runs", "v1")
