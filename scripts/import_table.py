#!/usr/bin/env python3
"""Prints which rooms of the package import which, as the table in docs/architecture.md.

python scripts/import_table.py             # --write puts it into the page
python scripts/import_table.py --deep      # folders within folders count as rooms of their own
"""

import argparse
import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- imports -->", "<!-- /imports -->"

#: The rooms in their order: each imports from those above it only.
ORDER = (
    "version",
    "errors",
    "hub",
    "utils",
    "_compat",
    "ops",
    "lm",
    "prompts",
    "backbone",
    "data",
    "adapters",
    "inference",
    "export",
    "inspection",
    "evaluation",
    "training",
    "vision",
    "planning",
    "callbacks",
    "cli",
    "studies",
)


def room_of(module: str, package: Path, deep: bool = False) -> str:
    """The room of a module: a file or folder at the package's root, or the folder that it lies in.

    Args:
        module: Its dotted name, with the package's or, of a name that was imported from a module, beyond it.
        package: The package's folder.
        deep: Whether folders within folders are rooms.
    """
    parts = module.split(".")[1:]
    depth = 1
    while deep and depth < len(parts) and (package / "/".join(parts[: depth + 1])).is_dir():
        depth += 1
    return "/".join(parts[:depth])


def imports(package: Path, deep: bool = False) -> dict[str, set[str]]:
    """Which rooms each room imports, itself left out; the package's own ``__init__`` is no room.

    Args:
        package: The package's folder.
        deep: Whether folders within folders are rooms.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        module = ".".join(file.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")
        if module in (package.name, f"{package.name}.__main__"):
            continue
        room = room_of(module, package, deep)
        used = found.setdefault(room, set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            rooms = {room_of(n, package, deep) for n in names if n.startswith(f"{package.name}.")}
            # Names that the package's own root exports are no rooms.
            used |= {r for r in rooms - {room} if (package / r).is_dir() or (package / f"{r}.py").is_file()}
    return found


def table(found: dict[str, set[str]]) -> str:
    """The Markdown table, a room a line, in the order of the layers."""

    def key(room: str) -> tuple[int, str]:
        return ORDER.index(room.split("/")[0]), room

    lines = ["| room | imports |", "|---|---|"]
    for room in sorted(found, key=key):
        named = ", ".join(f"`{other}`" for other in sorted(found[room], key=key))
        lines.append(f"| `{room}` | {named or 'nothing of the package'} |")
    arrows = sum(map(len, found.values()))
    return "\n".join([*lines, "", f"{len(found)} rooms, {arrows} arrows."])


def page_with(text: str, new: str) -> str:
    """The page with another table between its markers."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


def main() -> None:
    """Prints the table, or writes it."""
    parser = argparse.ArgumentParser(description="Prints which rooms of the package import which.")
    parser.add_argument("--deep", action="store_true", help="folders within folders count as rooms")
    parser.add_argument("--write", action="store_true", help=f"put it into {PAGE.relative_to(ROOT)}")
    args = parser.parse_args()
    new = table(imports(ROOT / "moka_pl", args.deep))
    if args.write:
        PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8"), new), encoding="utf-8")
    print(new)


if __name__ == "__main__":
    main()
