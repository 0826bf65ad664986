"""The files around the project agree with each other."""

from pathlib import Path

import pytest
import yaml

from moka_pl import __version__

ROOT = Path(__file__).parents[2]
YAML = sorted([*(ROOT / ".github").rglob("*.yml"), ROOT / "CITATION.cff"])


@pytest.mark.parametrize("file", YAML, ids=lambda file: file.name)
def test_yaml_can_be_read(file: Path) -> None:
    assert isinstance(yaml.safe_load(file.read_text(encoding="utf-8")), dict)


def test_the_version_is_the_same_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert f"## {__version__}\n" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_a_release_s_tag_must_be_the_version() -> None:
    file = ROOT / ".github" / "workflows" / "release.yml"
    workflow = yaml.safe_load(file.read_text(encoding="utf-8"))
    build, publish = workflow["jobs"]["build"], workflow["jobs"]["publish"]
    check = next(step["run"] for step in build["steps"] if "moka_pl.version" in step.get("run", ""))
    assert '"$GITHUB_REF_NAME" != "v$version"' in check
    assert "exit 1" in check
    assert publish["needs"] == "build"
    assert publish["permissions"] == {"id-token": "write"}
