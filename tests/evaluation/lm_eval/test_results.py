import json
import re
from pathlib import Path

import pytest

from moka_pl.adapters.reading import WEIGHTS_NAME
from moka_pl.errors import ConfigError
from moka_pl.evaluation.lm_eval.results import results_path, versions, weights_fingerprint, write_results


def test_where_results_go(tmp_path: Path) -> None:
    assert results_path(tmp_path / "new" / "a.json", tmp_path) == tmp_path / "new" / "a.json"
    for path in (results_path(None, tmp_path), results_path(tmp_path, tmp_path / "elsewhere")):
        assert path.parent == tmp_path
        assert re.fullmatch(r"results_\d{4}-\d\d-\d\dT\d\d-\d\d-\d\d\.json", path.name)
    assert not list((tmp_path / "new").iterdir())  # looking leaves nothing behind


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ConfigError, match=r"cannot write results to .*a.json: .*Choose another file with --output"
    ):
        results_path(tmp_path / "file" / "a.json", tmp_path)
    with pytest.raises(ConfigError, match="File name too long"):
        results_path(tmp_path / ("x" * 250), tmp_path)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_results({"n": 1, "ä": Path("x")}, path)
    assert json.loads(path.read_text(encoding="utf-8")) == {"n": 1, "ä": "x"}

    def full(self: Path, text: str, **options: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ConfigError, match=r"a.json: No space left on device"):
        write_results({"n": 2}, path)
    assert json.loads(path.read_text(encoding="utf-8"))["n"] == 1
    assert list(tmp_path.iterdir()) == [path]


def test_other_weights_have_another_fingerprint(adapter: Path) -> None:
    before = weights_fingerprint(adapter)
    assert re.fullmatch("[0-9a-f]{16}", before)
    file = adapter / WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert weights_fingerprint(adapter) != before


def test_versions() -> None:
    assert {"moka_pl", "lm_eval", "torch", "transformers"} <= set(versions())
