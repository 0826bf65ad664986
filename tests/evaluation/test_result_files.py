"""Results replace none, and are whole or not there."""

import errno
import os
from pathlib import Path
from unittest.mock import Mock

import pytest

from moka_pl.errors import ConfigError
from moka_pl.evaluation.result_files import write_results


@pytest.mark.parametrize("links", [True, False])
def test_earlier_files_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:
        monkeypatch.setattr(os, "link", Mock(side_effect=PermissionError))
    folder = tmp_path / "version_0"  # which it makes
    files = [write_results(folder / "test.json", text) for text in ("one", "two", "thrée")]
    assert [file.name for file in files] == ["test.json", "test_2.json", "test_3.json"]
    assert [file.read_text(encoding="utf-8") for file in files] == ["one", "two", "thrée"]
    (folder / "b").touch()
    assert files[1].stat().st_mode == (folder / "b").stat().st_mode  # others may read it, too
    assert {file.name for file in folder.iterdir()} == {*(file.name for file in files), "b"}


def test_nothing_is_left_of_what_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test.json").write_text("old")
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr("moka_pl.evaluation.result_files.sync_file", Mock(side_effect=full))
    told = r"printed above, to .*test\.json: No space left .* free\)\. Free some space, or choose"
    with pytest.raises(ConfigError, match=told):
        write_results(tmp_path / "test.json", "new")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("test.json", "old")]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"to .*file/x/test\.json: Not a directory"):
        write_results(tmp_path / "file" / "x" / "test.json", "new")
