"""What an installed package holds, beside its modules."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(*command: object, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_an_installed_package_finds_its_configurations(tmp_path: Path) -> None:
    source, folder, elsewhere = tmp_path / "source", tmp_path / "installed", tmp_path / "elsewhere"
    elsewhere.mkdir()
    # Built from a copy: a build leaves files beside its sources.
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    for name in tracked.stdout.splitlines():
        if not name.startswith(("tests/", "scripts/")) and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = ("-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", source, "--no-deps", "--no-build-isolation", "-w", tmp_path, cwd=tmp_path)
    [wheel] = tmp_path.glob("*.whl")
    run(*pip, "install", "--no-deps", "--target", folder, wheel, cwd=tmp_path)
    assert {path.name for path in (folder / "moka_pl/configs").iterdir()} == {
        path.name for path in (ROOT / "configs").iterdir()
    }

    def moka_pl(*arguments: str) -> str:
        return run("-m", "moka_pl", *arguments, cwd=elsewhere, PYTHONPATH=str(folder))

    assert moka_pl("configs").startswith("llama2 ")
    for given in ("smollm2", "configs/smollm2.yaml"):
        assert "name: smollm2-135m-instruct" in moka_pl("fit", "--config", given, "--print_config")
    moka_pl("configs", "--copy", "mine")
    assert (elsewhere / "mine/smollm2.yaml").is_file()
