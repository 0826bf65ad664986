"""Prints the lowest versions that pyproject.toml allows, as constraints for pip.

Usage: python .ci/lowest.py [PACKAGE ...] > constraints.txt

A package named on the command line is left out: it is there in a version of its own.
"""

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def lowest(pyproject: Path) -> dict[str, str]:
    """Returns the lower bound of every requirement with one, by canonical name."""
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    written = [*project["dependencies"]]
    for extra in ("demo", "peft", "eval", "studies", "vision", "test"):  # all that "test" asks for
        written += project["optional-dependencies"][extra]
    found = {}
    for requirement in map(Requirement, written):
        for bound in requirement.specifier:
            if bound.operator == ">=":
                found[canonicalize_name(requirement.name)] = bound.version
    return found


if __name__ == "__main__":
    left_out = {canonicalize_name(name) for name in sys.argv[1:]}
    for name, version in lowest(Path(__file__).parents[1] / "pyproject.toml").items():
        if name not in left_out:
            print(f"{name}=={version}")
