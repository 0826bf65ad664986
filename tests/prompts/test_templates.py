import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moka_pl

TEXTS = ("Below is an instruction", "Question:", "Answer:", "The following are", "Please choose the correct")


def strings(source: str) -> Iterator[str]:
    """Every string of a module that is no docstring."""
    tree = ast.parse(source)
    told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
            yield node.value


@pytest.mark.parametrize("text", TEXTS)
def test_what_a_model_is_shown_is_written_once(text: str) -> None:
    package = Path(moka_pl.__file__).parent
    holders = {
        path for path in package.rglob("*.py") for string in strings(path.read_text()) if text in string
    }
    holders |= {path for path in package.rglob("*.yaml") if text in path.read_text()}
    assert {path.relative_to(package) for path in holders} <= {
        Path("prompts/templates.py"),
        Path("prompts/choice.py"),
    }
    assert holders
