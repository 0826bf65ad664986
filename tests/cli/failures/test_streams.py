"""Standard streams that are closed, full or not in UTF-8, and words that are no text."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moka_pl.cli.failures.streams import check_words
from moka_pl.errors import ConfigError


def command(words, streams="", **environment):
    """Runs a command by a shell, which can close streams as no parent in Python can."""
    line = f'"$0" -c "$1" {words} {streams}'
    code = "from moka_pl.cli.main import main; main()"
    return subprocess.run(
        ["bash", "-c", line, sys.executable, code],
        capture_output=True,
        env=os.environ | environment,
        timeout=60,
    )


def script(code, streams="", **environment):
    """Runs a script after the streams have been opened."""
    begin = "from moka_pl.cli.failures.streams import open_streams; open_streams()\n"
    return subprocess.run(
        ["bash", "-c", f'"$0" -c "$1" {streams}', sys.executable, begin + code],
        capture_output=True,
        env=os.environ | environment,
        timeout=60,
    )


@pytest.mark.parametrize("encoding", ["latin-1", "ascii:surrogateescape", "cp1252", "utf-8:strict"])
def test_any_character_can_be_written(encoding):
    ended = script("print('α \\udce9')", PYTHONIOENCODING=encoding)
    assert (ended.returncode, ended.stderr) == (0, b"")
    expected = "α" if "utf" in encoding else "\\u03b1"
    assert ended.stdout.decode() == f"{expected} \\udce9\n"


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_closed_stream_is_no_file(tmp_path, closed):
    """Without being opened, the next file gets its number, and what is printed by C code."""
    file = tmp_path / "file"
    code = (
        f"import os, sys\nkept = open({str(file)!r}, 'w')\nos.system('echo printed; echo printed >&2; cat')\n"
        "print('out'); print('err', file=sys.stderr); sys.stdin.read()\n"
        "kept.write(str(kept.fileno() > 2))"
    )
    stdin = "</dev/null " if "<" not in closed else ""
    ended = script(code, stdin + closed)
    assert ended.returncode == 0
    assert file.read_text() == "True"


def test_a_question_without_stdin(tmp_path):
    ended = command(f"generate {tmp_path}", "<&-")
    assert (ended.returncode, ended.stderr.count(b"\n")) == (2, 1)
    assert b"Traceback" not in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
@pytest.mark.parametrize("words", ["--help", "--version", "configs"])
def test_an_output_that_cannot_be_written(words):
    ended = command(words, ">/dev/full")
    assert (ended.returncode, ended.stderr.count(b"\n")) == (2, 1)
    assert ended.stderr.startswith(b"moka_pl: error: ")
    assert b"No space left on device" in ended.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no device that is always full")
def test_a_command_that_has_failed_already(tmp_path):
    ended = command(f"inspect {tmp_path}", ">/dev/full")
    assert (ended.returncode, ended.stderr.count(b"\n")) == (2, 1)
    assert b"No space" not in ended.stderr


@pytest.mark.parametrize("name", ["inspect", "fit", "plan"])
def test_words_of_bytes_that_are_no_text(name):
    ended = command(f"{name} $'caf\\xe9.jsonl'", PYTHONUTF8="1")
    assert (ended.returncode, ended.stderr) == (
        2,
        b"moka_pl: error: the argument 'caf\\udce9.jsonl' is not in UTF-8; rename the file, or convert the "
        b"text\n",
    )


def test_words_in_a_locale_of_ascii():
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ended = command("inspect 'ü'", **locale)
    assert ended.returncode == 2
    assert ended.stderr.endswith(b"is not in UTF-8; set LC_ALL=C.UTF-8 or PYTHONUTF8=1\n")


def test_a_folder_of_bytes_that_are_no_text(tmp_path, monkeypatch):
    folder = tmp_path / "caf\udce9"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=r"the current folder '.*caf\\udce9' is not in UTF-8; rename it"):
        check_words([])


def test_a_folder_that_is_gone(tmp_path, monkeypatch):
    folder = tmp_path / "gone"
    folder.mkdir()
    monkeypatch.chdir(folder)
    folder.rmdir()
    with pytest.raises(ConfigError, match=r"the current folder is gone .*; change to another"):
        check_words([])
