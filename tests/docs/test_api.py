"""The API reference names what there is, and every public class and function."""

import re
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

import moka_pl
from moka_pl import adapters, callbacks, data

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md")]
TARGETS = sorted({target for text in PAGES for target in re.findall(r"^::: (\S+)$", text, re.MULTILINE)})
#: Values that the reference does without.
LEFT_OUT = {"__version__"}


def resolved(path: str) -> Any:
    """A module, or what a module has."""
    try:
        return import_module(path)
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(import_module(module), name)


@pytest.mark.parametrize("target", TARGETS)
def test_a_target_exists(target: str) -> None:
    assert resolved(target) is not None


@pytest.mark.parametrize(
    "package", [moka_pl, adapters, callbacks, data], ids=lambda package: package.__name__
)
def test_every_public_name_is_described(package: Any) -> None:
    for name in set(package.__all__) - LEFT_OUT:
        thing = getattr(package, name)
        home = f"{thing.__module__}.{thing.__qualname__}"
        assert home in TARGETS or thing.__module__ in TARGETS, home


def test_every_page_is_in_the_navigation() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    nav = re.findall(r"[\w/-]+\.md", str(yaml.safe_load(text)["nav"]))
    pages = [page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md")]
    assert sorted(nav) == sorted(pages)
