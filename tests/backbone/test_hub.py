"""Hub models: refusals in one message, and the local hub cache without a network."""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants, errors
from huggingface_hub.utils import filter_repo_objects
from torch import Tensor
from transformers import LlamaForCausalLM

from moka_pl.backbone import BackboneConfig, load_backbone, load_tokenizer
from moka_pl.backbone.hub import download_model
from moka_pl.errors import BackboneError

# The client's transport library: its name differs between versions.
http = import_module(errors.HfHubHTTPError.__mro__[1].__module__.partition(".")[0])
NAME = "someone/tiny-llama"
FIRST = "model-1.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def refusal(kind: type[errors.HfHubHTTPError], status: int) -> errors.HfHubHTTPError:
    request = http.Request("HEAD", f"https://huggingface.co/{NAME}/resolve/main/config.json")
    return kind("a long\n\nmessage of the client", response=http.Response(status, request=request))


FAILURES = {
    "gated": (refusal(errors.GatedRepoError, 403), "accept the licence .* 'hf auth login'"),
    "private or absent": (
        refusal(errors.RepositoryNotFoundError, 401),
        "'hf auth login'.* the spelling",
    ),
    "absent": (refusal(errors.RepositoryNotFoundError, 404), "no model .* 'someone/tiny-llama'.* spelling"),
    "no such revision": (refusal(errors.RevisionNotFoundError, 404), r"no model \(or revision\)"),
    "no config": (refusal(errors.RemoteEntryNotFoundError, 404), "no config.json.* GGUF"),
    "forbidden": (refusal(errors.HfHubHTTPError, 403), "gated, private"),
    "hub is down": (refusal(errors.HfHubHTTPError, 503), "cannot be reached .* local folder"),
    "no network": (http.ConnectError("[Errno -2] Name or service\nnot known"), "cannot be reached .*network"),
    "slow": (http.ConnectTimeout("timed out"), r"cannot be reached \(timed out\)"),
    "offline mode": (errors.OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE is set; unset it"),
}


pytestmark = pytest.mark.usefixtures("no_network")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, hub_cache: Path) -> Callable[[Exception], list[str]]:
    """Lets every look-up fail; returns the list of addresses that were looked up."""

    def fail(error: Exception) -> list[str]:
        asked = []

        def look_up(url: str, **_: object) -> None:
            asked.append(url)
            raise error

        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", look_up)
        return asked

    return fail


@pytest.fixture
def cached_model(hub_cache: Path, model_folder: Path) -> None:
    """The model, as an earlier download has left it."""
    repository = hub_cache / "models--someone--tiny-llama"
    shutil.copytree(model_folder, repository / "snapshots" / COMMIT)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failed_look_up_is_one_line_with_a_remedy(failure: str, hub: Callable) -> None:
    error, message = FAILURES[failure]
    asked = hub(error)
    with pytest.raises(BackboneError, match=message) as caught:
        load_backbone(BackboneConfig(NAME))
    assert NAME in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is error
    assert len(asked) == 1


def test_the_revision_is_looked_up(hub: Callable) -> None:
    asked = hub(FAILURES["no such revision"][0])
    with pytest.raises(BackboneError):
        load_tokenizer(BackboneConfig(NAME, revision="v1.2"))
    assert asked == [f"https://huggingface.co/{NAME}/resolve/v1.2/config.json"]


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.usefixtures("cached_model")
def test_a_cached_model_needs_no_hub(
    failure: str, hub: Callable, dense: LlamaForCausalLM, ids: Tensor
) -> None:
    hub(FAILURES[failure][0])
    loaded = load_backbone(BackboneConfig(NAME, quantization="none"))
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids).logits, dense(ids).logits)
    assert loaded.tokenizer.pad_token == "<|pad|>"


@pytest.mark.usefixtures("cached_model")
def test_another_revision_than_the_cached_one(hub: Callable) -> None:
    hub(FAILURES["no network"][0])
    assert load_tokenizer(BackboneConfig(NAME, revision=COMMIT))
    with pytest.raises(BackboneError, match="cannot be reached"):
        load_tokenizer(BackboneConfig(NAME, revision="v2"))


@pytest.mark.usefixtures("cached_model")
def test_a_half_downloaded_model(hub: Callable, hub_cache: Path) -> None:
    hub(FAILURES["no network"][0])
    next(hub_cache.rglob("model.safetensors")).unlink()
    with pytest.raises(BackboneError, match=f"{NAME} cannot be loaded") as caught:
        load_backbone(BackboneConfig(NAME))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("name", ["a b", "llama-2-7b hf", "x/-y", "a--b/c"])
def test_what_is_no_hub_id(name: str) -> None:
    with pytest.raises(BackboneError, match="neither a folder nor a hub id") as caught:
        load_backbone(BackboneConfig(name))
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("hub_cache")
def test_without_a_network_the_client_fails_in_one_line() -> None:
    with pytest.raises(BackboneError, match=f"{NAME} is not in the hub cache") as caught:
        load_backbone(BackboneConfig(NAME))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (["model-1.safetensors", "pytorch_model.bin"], ["model-1.safetensors"]),
        (
            ["model.safetensors", "consolidated.safetensors", "original/model.safetensors"],
            ["model.safetensors"],
        ),
        (["pytorch_model-1.bin", "training_args.bin"], ["pytorch_model-1.bin"]),
    ],
)
def test_weights_are_downloaded_once_in_whatever_files(stored, wanted, tmp_path, monkeypatch) -> None:
    def download(name: str, **options) -> str:
        assert (name, options.pop("revision")) == ("some/model", "v1")
        for file in filter_repo_objects(["config.json", *stored], **options):
            (tmp_path / file).touch()
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert download_model("some/model", "v1") == tmp_path
    assert sorted(file.name for file in tmp_path.iterdir()) == ["config.json", *wanted]


@pytest.mark.parametrize(
    ("free", "there", "refused"),
    [
        (2999, [], True),
        (3000, [], False),
        (1000, ["model-1.safetensors"], False),
        (999, ["model-1.safetensors"], True),
    ],
)
def test_what_does_not_fit_into_the_hub_cache_is_not_downloaded(
    free: int,
    there: list[str],
    refused: bool,
    hub_cache: Path,
    free_space: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sizes = {FIRST: 2000, "model-2.safetensors": 1000, "pytorch_model.bin": 10**6}
    sizes |= {"original/model.safetensors": 10**6, "config.json": 10**6}
    files = [SimpleNamespace(rfilename=name, size=size) for name, size in sizes.items()]
    found = SimpleNamespace(siblings=files, sha=COMMIT)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(hub_cache))
    for name in there:
        file = hub_cache / "models--someone--tiny-llama" / "snapshots" / COMMIT / name
        file.parent.mkdir(parents=True)
        file.touch()
    free_space(free)
    if not refused:
        download_model(NAME)
        return
    with pytest.raises(BackboneError, match=r"does not fit into the hub cache .* free; .* set HF_HUB_CACHE"):
        download_model(NAME)
