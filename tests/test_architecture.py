"""The house keeps its rules: imports go one way, files and functions stay short, tests mirror the package."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moka_pl"

#: Rooms of the package by layer. A room may import from lower layers and from itself.
LAYERS = {
    "errors": 0,
    "version": 0,
    "_compat": 1,
    "hub": 1,
    "utils": 1,
    "ops": 2,
    "lm": 3,
    "prompts": 3,
    "backbone": 4,
    "data": 5,
    "adapters": 6,
    "inference": 7,
    "export": 8,
    "evaluation": 9,
    "training": 10,
    "planning": 11,
    "vision": 11,
    "callbacks": 12,
    "inspection": 12,
    "cli": 13,
    "studies": 14,
    "__main__": 15,
    "__init__": 15,
}

MAX_LINES, MAX_FUNCTION_LINES, MAX_FILES, MAX_ROOT_FILES = 400, 60, 15, 8


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def nodes(path: Path) -> list[ast.AST]:
    return list(ast.walk(tree(path)))


@cache
def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    """Name of the top-level room of a file, as ``LAYERS`` has it."""
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every module of the package that a file imports, lazily or not."""
    for node in nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            if node.module == "moka_pl":
                yield from ((node.lineno, f"moka_pl.{alias.name}") for alias in node.names)
            else:
                yield node.lineno, node.module or ""


def test_every_room_has_a_layer() -> None:
    rooms = {room(path) for path in modules()}
    assert rooms <= set(LAYERS)


def upward_imports(path: Path) -> Iterator[str]:
    source = room(path)
    for line, name in imported(path) if source not in ("__init__", "__main__") else ():
        package, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if package != "moka_pl" or not rest:
            continue
        # A public name such as ``moka_pl.MokaConfig`` would import the whole package's face.
        if target not in LAYERS:
            yield f"{path}:{line}: import {name} from its own module"
        elif target != source and LAYERS[target] >= LAYERS[source]:
            yield f"{path}:{line}: {source} imports {target}, which is not below it"


def test_imports_only_go_down() -> None:
    assert modules()
    assert not [wrong for path in modules() for wrong in upward_imports(path)]


def test_nothing_outside_studies_imports_them() -> None:
    for path in modules():
        if room(path) != "studies":
            for line, name in imported(path):
                assert not name.startswith("moka_pl.studies"), f"{path}:{line} imports {name}"


def long_parts(path: Path) -> Iterator[str]:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    if lines > MAX_LINES:
        yield f"{path} has {lines} lines"
    for node in nodes(path):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES and not _may_be_long(path, node):
                yield f"{path}:{node.lineno}: {node.name} has {length} lines"


def test_files_and_functions_are_short() -> None:
    assert not [long for path in modules() for long in long_parts(path)]


def _may_be_long(path: Path, node: ast.FunctionDef) -> bool:
    """Kernels may be long, and commands whose help is their docstring."""
    kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
    return kernel or (room(path) == "cli" and node.name == path.stem)


def test_folders_are_small() -> None:
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        files = [file for file in folder.iterdir() if file.is_file()]
        most = MAX_ROOT_FILES if folder == PACKAGE else MAX_FILES
        assert len(files) <= most, f"{folder} holds {len(files)} files"


def test_tests_mirror_the_package() -> None:
    """A folder of tests is a folder of the package, and a test file names a file, where there is one."""
    for file in (ROOT / "tests").rglob("test_*.py"):
        folder = file.relative_to(ROOT / "tests").parent
        if folder.parts[:1] in (("gpu",), ("docs",), ("examples",)):
            continue
        assert (PACKAGE / folder).is_dir(), f"{file} lies in a folder that moka_pl has not"


def public_functions(module: ast.Module) -> Iterator[ast.FunctionDef]:
    """Public functions of a module, and public methods of its public classes."""
    for node in module.body:
        if isinstance(node, ast.FunctionDef):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from (method for method in node.body if isinstance(method, ast.FunctionDef))


def undescribed(path: Path) -> Iterator[str]:
    for node in public_functions(tree(path)):
        named = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments = [argument.arg for argument in named if argument.arg not in ("self", "cls", "ctx")]
        documented = ast.get_docstring(node) or ""
        # Hooks that Lightning calls have Lightning's arguments, overrides those of the method that they name.
        inherited = "pl_module" in arguments or documented.startswith("As :meth:")
        kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        described = node.name.startswith("_") or inherited or kernel or "Args:" in documented
        if len(arguments) >= 3 and not described:
            yield f"{path}:{node.lineno}: {node.name} does not describe {arguments}"


def test_three_and_more_arguments_are_described() -> None:
    assert not [wrong for path in modules() for wrong in undescribed(path)]


def nameless_warnings(path: Path) -> Iterator[str]:
    for node in nodes(path):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called.endswith("rank_zero_warn") or called == "warnings.warn":
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if "MokaWarning" not in map(ast.unparse, given):
                yield f"{path}:{node.lineno}: not a MokaWarning, which is told in one line"


def test_warnings_are_told_in_one_line() -> None:
    assert not [wrong for path in modules() for wrong in nameless_warnings(path)]


def test_home_folders_are_expanded_alike() -> None:
    """``Path.expanduser`` raises an error where nobody is known by the name; ``utils.expanded`` does not."""
    for path in modules():
        called = [node.attr for node in nodes(path) if isinstance(node, ast.Attribute)]
        assert "expanduser" not in called or path.name == "utils.py", path
