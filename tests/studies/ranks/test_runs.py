"""Commands that end with all that they started."""

import sys

import pytest

from moka_pl.errors import ConfigError
from moka_pl.studies.ranks.runs import run_to_end


def test_a_command_that_takes_too_long_or_fails_is_an_error(tmp_path, capfd) -> None:
    with pytest.raises(ConfigError, match=r"not done after 0\.01 s"):
        run_to_end([sys.executable, "-c", "while True: pass"], tmp_path / "a.txt", 0.01)
    with pytest.raises(ConfigError, match="status 3: so it ends"):
        run_to_end(["sh", "-c", "echo first; echo so it ends; exit 3"], tmp_path / "b.txt", 9)
    assert "first\nso it ends" in capfd.readouterr().err
