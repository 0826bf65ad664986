import json
from dataclasses import asdict

import pytest

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.bench import load_results
from moka_pl.studies.common import device_name, versions


def test_round_trip(results, tmp_path) -> None:
    file = tmp_path / "results.json"
    results.save(file)
    results.save(file)
    assert load_results(file) == results
    assert asdict(load_results(file)) == asdict(results)
    assert json.loads(file.read_text())["format"] == 1
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds no results of format 1; write it with"),
        ('{"format": 2}', "holds no results of format 1"),
        ('{"format": 1}', "is damaged: 'records'"),
        ('{"format": 1, "records": [{"row": "x"}]}', "is damaged"),
        ('{"format": 1, "records": [], "preset": {}}', "is damaged"),
    ],
)
def test_other_files_are_refused(content: str, message: str, tmp_path) -> None:
    file = tmp_path / "results.json"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_results(file)
    assert str(file) in str(caught.value)


def test_a_missing_file(tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no\.json cannot be read: No such file"):
        load_results(tmp_path / "no.json")


def test_the_machine() -> None:
    assert "threads)" in device_name("cpu")
    assert {"python", "torch", "transformers", "bitsandbytes", "peft", "lightning"} <= set(versions())
