"""Files and folders are replaced whole, whatever happens."""

import errno
import math
import os
import signal
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from lightning.pytorch.utilities import rank_zero_only

from moka_pl import utils
from moka_pl.cli.main import main
from moka_pl.errors import MokaWarning
from moka_pl.studies.benchmark.arguments import make_parser
from moka_pl.utils import (
    expanded,
    recover_folder,
    replaced_file,
    replaced_folder,
    set_environment,
    unwritable_reason,
    warn,
    write_failure,
)

OLD, NEW = {"weights": b"old", "notes": b"mine"}, {"weights": b"new", "notes": b"mine"}


@pytest.fixture(params=["exchange", "two renames"])
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A system that exchanges names, and one that cannot."""
    if request.param == "two renames":
        monkeypatch.setattr(utils, "_exchange", lambda one, other: False)
    elif sys.platform not in ("linux", "darwin"):
        pytest.skip("cannot exchange names")
    return request.param


@pytest.mark.parametrize(
    ("given", "found"),
    [("~", "/home/me"), ("~/a b", "/home/me/a b"), ("~no_such_user/x", "~no_such_user/x"), ("a/~", "a/~")],
)
def test_a_home_folder_is_found_where_there_is_one(given, found, monkeypatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded(given) == expanded(Path(given)) == Path(found)


def test_a_path_below_a_file_is_told(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert unwritable_reason(file) == unwritable_reason(file / "a/b") == f"{file} is a file"
    assert unwritable_reason(tmp_path / "a/b") is None


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def write(path: Path, files: dict[str, bytes]) -> None:
    with replaced_folder(path) as new:
        new.mkdir()
        for name, content in files.items():
            (new / name).write_bytes(content)


def fail(path: Path, error: BaseException) -> None:
    with replaced_folder(path) as new:
        new.mkdir()
        (new / "weights").write_bytes(b"half")
        raise error


def test_replaces_and_leaves_nothing_else(tmp_path, system):
    path = tmp_path / "runs" / "best"
    for files in (OLD, NEW):
        write(path, files)
        assert contents(path) == files
        assert list(path.parent.iterdir()) == [path]


def test_writes_through_a_link(tmp_path, system):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "best").symlink_to("elsewhere")
    write(tmp_path / "best", NEW)
    assert (tmp_path / "best").is_symlink()
    assert contents(tmp_path / "elsewhere") == NEW


@pytest.mark.parametrize("error", [OSError(errno.EIO, "broken"), KeyboardInterrupt()])
def test_an_error_in_the_body_changes_nothing(tmp_path, system, error):
    path = tmp_path / "best"
    write(path, OLD)
    with pytest.raises(type(error)):
        fail(path, error)
    assert contents(tmp_path) == {f"best/{name}": content for name, content in OLD.items()}


# What killed processes leave: the files below a folder, and whether `best` is to be found with them.
LEFT = {
    "between two renames": (
        {"best.older-abcd1234/weights": b"old", ".best-abcd1234/whole/weights": b"new"},
        True,
    ),
    "by an earlier version": (
        {".best-abcd1234/old/weights": b"old", ".best-abcd1234/new/weights": b"new"},
        True,
    ),
    "the first one, whole": ({".best-abcd1234/whole/weights": b"new"}, True),
    "the first one, half": ({".best-abcd1234/new/weights": b"ne"}, False),
    "another folder's": ({".best-of-abcd1234/whole/weights": b"new"}, False),
}


@pytest.mark.parametrize(("files", "found"), LEFT.values(), ids=LEFT)
def test_recovers_the_only_copy_and_clears_away_left_overs(tmp_path, files, found):
    def leave() -> None:
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(content)

    path, others = tmp_path / "best", [tmp_path / ".best-of-abcd1234"] if "best-of" in str(files) else []
    leave()
    if found:
        with pytest.warns(UserWarning, match="best is restored: a killed process had left it under the name"):
            recover_folder(path)
        assert contents(path)["weights"] in (b"old", b"new")
    else:
        recover_folder(path)
        assert not path.exists()
    leave()
    write(path, NEW)
    assert contents(path) == NEW
    assert sorted(tmp_path.iterdir()) == sorted([path, *others])


def test_leaves_a_living_process_its_folder(tmp_path):
    path = tmp_path / "best"
    with replaced_folder(path) as ours:
        ours.mkdir()
        (ours / "weights").write_bytes(b"ours")
        write(path, OLD)  # another one, meanwhile
        assert contents(ours) == {"weights": b"ours"}
    assert contents(path) == {"weights": b"ours"}
    assert list(tmp_path.iterdir()) == [path]


def test_says_how_much_space_a_full_disk_lacks(tmp_path):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    said = write_failure(full, tmp_path / "not" / "there", 5 << 20)
    assert said.startswith("No space left on device (5.0 MiB needed, ")
    assert said.endswith(" free)")
    assert (
        write_failure(OSError(errno.EROFS, "Read-only file system"), tmp_path, 5) == "Read-only file system"
    )


# Kills at any instruction

POINTS = 75  # of each kind; all of them were tried, and take minutes


def run_until(event: float, act: Callable[[int], None], body: Callable[[], None]) -> int:
    """Runs a body in a child, and an act from one of its instructions on; returns how many it came to."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        count = 0

        def trace(frame, kind, arg):
            nonlocal count
            frame.f_trace_opcodes = frame.f_code.co_filename == utils.__file__
            if "moka_pl" in frame.f_code.co_filename or "shutil" in frame.f_code.co_filename:
                count += 1
                if count >= event:
                    act(count - int(event))
            return trace

        sys.settrace(trace)
        try:
            body()
        finally:
            sys.settrace(None)
            os.write(writer, str(count).encode())
            os._exit(0)
    os.waitpid(child, 0)
    os.close(writer)
    with os.fdopen(reader) as told:
        return int(told.read() or 0)


def kill(since: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_twice(since: int) -> None:
    if since in (0, 4):
        raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("act", [kill, interrupt_twice])
@pytest.mark.filterwarnings("ignore:.*by a killed process")
def test_survives_a_kill_at_any_instruction(tmp_path, system, act, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of no use to a process that is killed
    path = tmp_path / "best"
    write(path, OLD)
    events = run_until(math.inf, act, lambda: write(path, NEW))
    assert events > 300
    for event in range(1, events, events // POINTS):
        write(path, OLD)
        assert list(tmp_path.iterdir()) == [path], f"event {event}"
        run_until(event, act, lambda: write(path, NEW))
        seen = [item for item in tmp_path.iterdir() if item.name.startswith("best")]
        assert seen, f"event {event}: nothing to be seen in a shell"
        recover_folder(path)
        assert contents(path) in (OLD, NEW), f"event {event}"


def test_a_file_is_replaced_once_it_is_whole(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")
    with suppress(KeyError), replaced_file(target) as file:
        file.write(b"half")
        raise KeyError
    assert target.read_text() == "old"
    with replaced_file(target) as file:
        file.write(b"new")
        file.flush()
        assert target.read_text() == "old"
    assert target.read_text() == "new"
    (tmp_path / "b").touch()
    assert target.stat().st_mode == (tmp_path / "b").stat().st_mode  # others may read it, too
    assert {file.name for file in tmp_path.iterdir()} == {"a.json", "b"}


def test_a_warning_is_ours_and_of_the_first_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.warns(MokaWarning, match="^careful$") as told:
        warn("careful")
    assert told[0].filename == __file__
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("careful")


@pytest.fixture
def bare_environment(monkeypatch):
    """An environment without what :func:`set_environment` sets, which a test cannot change for others."""
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr("platform.release", lambda: "6.8.0-generic")
    return os.environ


def test_the_environment_lets_gpu_memory_grow(bare_environment) -> None:
    set_environment()
    assert bare_environment["TOKENIZERS_PARALLELISM"] == "false"
    assert bare_environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"


@pytest.mark.parametrize(
    "name",
    ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "TOKENIZERS_PARALLELISM"],
)
def test_the_environment_of_the_user_stays(name, bare_environment) -> None:
    bare_environment[name] = "theirs"
    set_environment()
    assert bare_environment[name] == "theirs"
    assert ("PYTORCH_ALLOC_CONF" in bare_environment) == (
        name in ("PYTORCH_ALLOC_CONF", "TOKENIZERS_PARALLELISM")
    )


@pytest.mark.parametrize(
    ("system", "release"), [("win32", "11"), ("linux", "5.15.90.1-microsoft-standard-WSL2")]
)
def test_gpu_memory_does_not_grow_on_windows(system, release, bare_environment, monkeypatch) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr("platform.release", lambda: release)
    set_environment()
    assert bare_environment["TOKENIZERS_PARALLELISM"] == "false"
    assert "PYTORCH_ALLOC_CONF" not in bare_environment


@pytest.mark.parametrize("command", [main, make_parser])
def test_commands_and_scripts_set_the_environment(command, bare_environment) -> None:
    with suppress(SystemExit):
        command(*[["--version"]] * (command is main))
    assert bare_environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
