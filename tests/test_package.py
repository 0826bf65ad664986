"""What the package exports, and what importing it costs."""

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import moka_pl

ROOT = Path(__file__).parents[1]

HEAVY = ("torch", "lightning", "transformers", "bitsandbytes", "datasets", "numpy")


def imported(code: str) -> set[str]:
    """Heavy packages that a fresh interpreter has imported after ``code``."""
    report = f"{code}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", report], capture_output=True, text=True, check=True)
    return set(result.stdout.split())


def test_importing_the_package_or_the_command_line_is_light() -> None:
    code = (
        "import moka_pl, moka_pl.cli.main, moka_pl.errors, moka_pl.version\n"
        "moka_pl.cli.main.function_parser('generate')"
    )
    assert imported(code) == set()


@pytest.mark.parametrize("name", moka_pl.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(moka_pl, name)
    assert name in dir(moka_pl)


def test_public_names_are_those_of_their_modules() -> None:
    from moka_pl.backbone import BackboneConfig
    from moka_pl.inference import load_model

    assert moka_pl.BackboneConfig is BackboneConfig
    assert moka_pl.load_model is load_model
    names = [name for home in moka_pl._HOMES.values() for name in home]
    assert sorted(names) == sorted(set(moka_pl.__all__) - {"__version__"})


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'moka_pl' has no attribute 'Mokka'"):
        _ = moka_pl.Mokka
    assert not hasattr(moka_pl, "__wrapped__")


def test_every_class_that_a_file_names_has_a_public_path() -> None:
    files = [*ROOT.glob("configs/*.yaml"), *ROOT.glob("scripts/suites/*.yaml"), *ROOT.glob("docs/**/*.md")]
    named = {
        path
        for file in [*files, ROOT / "README.md"]
        for path in re.findall(r"class_path: (moka_pl\.[\w.]+)", file.read_text(encoding="utf-8"))
    }
    assert {"moka_pl.WarmupDecay", "moka_pl.data.MixtureData"} <= named
    for path in named:
        module, _, name = path.rpartition(".")
        home = import_module(module)
        assert name in home.__all__, path
        assert Path(str(home.__file__)).name == "__init__.py", path


def test_no_text_names_a_file_that_is_not_installed() -> None:
    for file in (ROOT / "moka_pl").rglob("*.py"):
        if "studies" in file.parts:
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.search(r"\b(scripts|tests|docs|examples)/\S*", node.value)
                assert named is None, f"{file}, line {node.lineno}: {named}"
