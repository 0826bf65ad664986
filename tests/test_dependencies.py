"""What the package imports is declared, and what is declared is bounded and installed."""

import ast
import importlib.metadata
import json
import runpy
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
DISTRIBUTIONS = importlib.metadata.packages_distributions()

#: Imported inside functions that say which extra is missing, by that extra.
OPTIONAL = {"gguf": "demo", "peft": "peft", "lm-eval": "eval", "scikit-learn": "vision"}
#: Likewise, but not always installed with the tests; mlx comes with mlx-lm, under a name for each device.
SELDOM = {"llama-cpp-python": "gguf", "mlx-lm": "mlx", "torchao": "torchao", "hqq": "hqq"}
WITH_MLX = {"mlx", "mlx-cpu", "mlx-metal"}
#: Comes with torch where there is a GPU, and is imported there only.
WITH_TORCH = {"triton"}
#: Used by other libraries of ours, not by us, or not installed everywhere.
INDIRECT = {"accelerate", "jinja2", "liger-kernel"}
EXTRA_NAMES = [
    "demo",
    "peft",
    "eval",
    "torchao",
    "hqq",
    "studies",
    "vision",
    "reasoning",
    "test",
    "trl",
    "docs",
]
#: Without an upper bound: other requirements bound them, and a new major comes every few months.
UNBOUNDED = {"pillow", "pyarrow"}


def requirements(*extras: str) -> dict[str, Requirement]:
    """The package's requirements and those of extras, with the extras that these name, by canonical name."""
    found: dict[str, Requirement] = {}
    for requirement in map(Requirement, [*PROJECT["dependencies"], *(r for e in extras for r in EXTRAS[e])]):
        if requirement.name == PROJECT["name"]:
            found |= requirements(*requirement.extras)
        else:
            found[canonicalize_name(requirement.name)] = requirement
    return found


def imported(*patterns: str, without: str = "-") -> set[str]:
    """Canonical names of the distributions that files import, anywhere in them."""
    names: set[str] = set()
    for file in (file for pattern in patterns for file in ROOT.glob(pattern)):
        if not file.is_relative_to(ROOT / without):
            names |= set(imported_modules(ast.parse(file.read_text(encoding="utf-8"))))
    names -= sys.stdlib_module_names | {"moka_pl"}
    return {canonicalize_name(DISTRIBUTIONS[name][0]) for name in names if name in DISTRIBUTIONS}


def imported_modules(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module).split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("find_spec"):
            # Asked for by name and imported by another library, as transformers imports gguf.
            yield from (str(argument.value) for argument in node.args if isinstance(argument, ast.Constant))


def test_the_package_imports_only_what_it_declares() -> None:
    undeclared = imported("moka_pl/**/*.py", without="moka_pl/studies") - requirements().keys()
    assert undeclared - SELDOM.keys() - WITH_MLX == OPTIONAL.keys() | WITH_TORCH
    for name, extra in (OPTIONAL | SELDOM).items():
        assert name in requirements(extra)


def test_the_studies_and_the_scripts_import_only_what_their_extras_declare() -> None:
    found = imported("moka_pl/studies/**/*.py", "scripts/*.py")
    assert found - WITH_TORCH - requirements("studies").keys() <= {"reasoning-gym"}
    assert "reasoning-gym" in requirements("reasoning")


def test_the_tests_import_only_what_their_extra_declares() -> None:
    assert imported("tests/**/*.py", ".ci/*.py") <= requirements("test").keys()


def test_every_declared_package_is_imported() -> None:
    used = imported("moka_pl/**/*.py", "scripts/*.py") | INDIRECT
    assert requirements("demo", "peft", "eval", "studies", "vision").keys() <= used
    source = (ROOT / "moka_pl" / "studies" / "reasoning.py").read_text(encoding="utf-8")
    assert "reasoning_gym" in imported_modules(ast.parse(source))  # by its name: it need not be installed


@pytest.mark.parametrize("extra", EXTRA_NAMES)
def test_every_requirement_is_bounded_on_both_sides(extra: str) -> None:
    for name, requirement in requirements(extra).items():
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators >= ({">="} if name in UNBOUNDED else {">=", "<"}), requirement


def test_releases_that_were_withdrawn_are_excluded() -> None:
    allowed = requirements()["lightning"].specifier
    assert not list(allowed.filter(["2.6.2", "2.6.3"]))
    assert list(allowed.filter(["2.6.0", "2.6.6"]))


def test_the_installed_versions_are_allowed() -> None:
    installed = {canonicalize_name(d.name): d.version for d in importlib.metadata.distributions()}
    for name, requirement in requirements("test").items():
        if name in installed:
            assert requirement.specifier.contains(installed[name]), f"{requirement}: {installed[name]}"


def test_the_versions_of_the_published_measurements_are_allowed() -> None:
    allowed = requirements("test")
    files = list((ROOT / "scripts" / "results").glob("*.json"))
    assert files
    for file in files:
        for name, version in json.loads(file.read_text(encoding="utf-8"))["versions"].items():
            if (requirement := allowed.get(canonicalize_name(name))) is not None:
                assert requirement.specifier.contains(version), f"{file.name}: {name} {version}"


def test_the_lowest_environment_is_read_from_the_lower_bounds() -> None:
    lowest = runpy.run_path(str(ROOT / ".ci" / "lowest.py"))["lowest"](ROOT / "pyproject.toml")
    declared = requirements("test")
    assert lowest.keys() == declared.keys()
    for name, version in lowest.items():
        assert declared[name].specifier.contains(version), name


def test_the_tests_of_the_lowest_environment_are_there() -> None:
    for path in (ROOT / ".ci" / "lowest-tests").read_text(encoding="utf-8").split():
        assert (ROOT / path).exists(), path
