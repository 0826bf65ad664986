"""Rounding and mistakes in small exports, and the memory of a whole one."""

import re
from pathlib import Path

import pytest

from moka_pl.studies.exports import main


def test_what_rounding_does_not_explain_tells_mistakes(
    one_thread: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--layers", "2", "--hidden", "64"])
    told = capsys.readouterr().out
    assert told.startswith("2 layers, hidden size 64:\n  loss ")
    beyond = {what: float(x) for what, x in re.findall(r"mistake: (.*?) +in .* rounding (\S+)", told)}
    assert beyond.pop("none") < 1e-4 < min(beyond.values())
    assert len(beyond) == 3


@pytest.mark.slow
def test_an_export_is_watched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--large", str(tmp_path), "--shape", "tiny"])
    told = capsys.readouterr().out
    assert "GB anonymous (peak of all" in told
    assert "beyond rounding to float16" in told
    assert "\nexit 0: " in told
