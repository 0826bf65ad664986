"""The page on architecture tells the tree, the imports and the files as they are."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
CHANGES = 16
MOST_WORDS = 8


def section(name: str) -> str:
    _, _, rest = TEXT.partition(f"<!-- {name} -->\n")
    inside, end, _ = rest.partition(f"<!-- /{name} -->")
    assert end
    return inside


def listed() -> dict[str, str]:
    """Every path of the drawn tree, with what it says of it."""
    found, folders = {}, []
    for line in section("tree").splitlines():
        if line.startswith("```"):
            continue
        indent = len(line) - len(line.lstrip())
        name, _, about = line.strip().partition(" ")
        del folders[indent // 2 :]
        path = "".join([*folders, name])
        if name.endswith("/"):
            folders.append(name)
        found[path] = about.strip()
    return found


def test_the_tree_lists_every_file_and_folder_and_no_other() -> None:
    package = ROOT / "moka_pl"
    files = [file for file in package.rglob("*.py") if file.name != "__init__.py"]
    folders = [file.parent for file in package.rglob("__init__.py")]
    there = {str(file.relative_to(ROOT)) for file in files}
    there |= {f"{folder.relative_to(ROOT)}/" for folder in folders}
    assert sorted(listed()) == sorted(there)


def test_every_file_has_a_few_words() -> None:
    long = {path: about for path, about in listed().items() if len(about.split()) > MOST_WORDS}
    silent = [path for path, about in listed().items() if path.endswith(".py") and not about]
    assert not long
    assert not silent


def test_the_table_of_imports_is_the_one_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("import_table", ROOT / "scripts" / "import_table.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert section("imports").strip() == script.table(script.imports(ROOT / "moka_pl")), (
        "run python scripts/import_table.py --write"
    )


def rows() -> list[list[str]]:
    _, _, rest = TEXT.partition("## Usual change → file\n")
    lines = [line for line in rest.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def test_there_are_sixteen_changes() -> None:
    assert len(rows()) == CHANGES
    assert len({row[0] for row in rows()}) == CHANGES


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0])
def test_the_files_and_names_of_a_change_exist(row: list[str]) -> None:
    _, file, about = row
    path = ROOT / file.strip("`")
    assert path.is_file()
    for name in re.findall(r"`([^`]+)`", about):
        if name.endswith(".py"):
            assert (path.parent / name).is_file() or (ROOT / "moka_pl" / name).is_file(), name
        elif name.startswith("tests/"):
            assert (ROOT / name).is_dir(), name
        elif name.isidentifier() or name.replace(".", "_").isidentifier():
            last = name.split(".")[-1]
            beside = path.read_text(encoding="utf-8")
            assert name == "class_path" or re.search(rf"\b{last}\b", beside), name
