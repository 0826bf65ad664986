"""Which code a configuration may name: classes of installed packages, of the kinds that a run is made of.

A ``class_path`` is a module to import and a class to call, so a configuration of a stranger's is a program.
jsonargparse refuses what is not allowed here before it imports anything; what was imported is compared with
the kinds before anything is called.
"""

import os
import re
import site
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from importlib.metadata import distributions
from json import loads
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlparse

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from moka_pl.errors import ConfigError

#: The option of the command line, never of a file, that lets configurations name any class but the system's.
TRUST = "trust_config"
TRUST_VARIABLE = "MOKA_PL_TRUST_CONFIG"

#: What installs or imports other code, or decides what may be imported.
_NEVER = {"jsonargparse", "pip", "setuptools", "pkg_resources", "distutils", "_distutils_hack", "wheel"}
_NEVER |= sys.stdlib_module_names

_DENIED = re.compile(r"Importing '([^']*)' is not allowed, denied by .*? to allow it\.")
_OPTION = re.compile(r'Parser key "([^"]+)":')

_KINDS = (
    ("torch.optim", "Optimizer"),
    ("torch.optim.lr_scheduler", "LRScheduler"),
    ("torch.optim.lr_scheduler", "ReduceLROnPlateau"),
    ("lightning.pytorch", "Callback"),
    ("lightning.pytorch", "LightningDataModule"),
    ("lightning.pytorch.accelerators", "Accelerator"),
    ("lightning.pytorch.loggers", "Logger"),
    ("lightning.pytorch.plugins", "CheckpointIO"),
    ("lightning.pytorch.plugins", "ClusterEnvironment"),
    ("lightning.pytorch.plugins", "LayerSync"),
    ("lightning.pytorch.plugins", "Precision"),
    ("lightning.pytorch.profilers", "Profiler"),
    ("lightning.pytorch.strategies", "Strategy"),
    ("moka_pl.adapters", "AdapterConfig"),
    ("moka_pl.backbone", "BackboneConfig"),
    ("moka_pl.training.learning_rates", "LearningRateRatios"),
    ("moka_pl.training.module", "MokaModule"),
)
#: As jsonargparse's own settings: one for the process.
_policy = {"trusted": False}

_CHOSEN = {"model.optimizer": _KINDS[:1], "model.lr_scheduler": _KINDS[1:3]}


def restrict_class_paths(trusted: bool | None = None) -> None:
    """Lets configurations name classes of installed packages only, or also of the user's own folders.

    Args:
        trusted: Whether modules of the current folder and of ``PYTHONPATH`` count, too, and classes of any
            kind; None asks the environment.
    """
    if trusted is None:
        trusted = os.environ.get(TRUST_VARIABLE, "").lower() in ("1", "true", "yes")
    _policy["trusted"] = trusted
    installed = {"moka_pl", "peft", *_installed_modules()} - _NEVER
    own = {name for folder in _own_folders() for name in _modules_in(folder)} - _NEVER - installed
    set_parsing_settings(
        import_path_denylist=["*", *(() if trusted else sorted(own))],
        import_path_allowlist=sorted(installed | own if trusted else installed),
        # Otherwise any class could be called for an option of no particular type.
        instantiate_subclass_spec_in_any=trusted,
    )


def split_trust(arguments: Sequence[str]) -> tuple[list[str], bool | None]:
    """Takes ``--trust_config`` out of a command line, so that no configuration can hold it.

    Returns:
        The other arguments, and what was said; None where nothing was.

    Raises:
        ConfigError: If its value is neither true nor false.
    """
    option, values = f"--{TRUST}", {"true": True, "false": False}
    others: list[str] = []
    trusted = None
    given = list(arguments)
    while given:
        name, sign, value = (argument := given.pop(0)).partition("=")
        if name != option:
            others.append(argument)
            continue
        value = value if sign else given.pop(0) if given else ""
        if value not in values:
            raise ConfigError(f"{option} takes true or false, not {value!r}")
        trusted = values[value]
    return others, trusted


def names_kind(path: str, kind: type) -> bool:
    """Whether a class path, or the name of a class that is imported, names a class of a kind.

    What jsonargparse would not import, or cannot, names none: its own parser tells why.
    """
    if "." not in path:
        return path in _names(kind)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--named", type=type[kind])
    try:
        parser.parse_args([f"--named={path}"])
    except Exception:  # a module that is imported may raise anything
        return False
    return True


def _names(kind: type) -> set[str]:
    return {kind.__name__}.union(*map(_names, kind.__subclasses__()))


def explain_denied(message: str) -> str:
    """Returns what to do about a class path that is not allowed; empty for another message of jsonargparse's.

    Args:
        message: Its message in one line.
    """
    found, option = _DENIED.search(message), _OPTION.match(message)
    if found is None:
        return ""
    return f"{option[1]}: {_reason(found[1])}" if option else _reason(found[1])


def check_classes(config: Namespace) -> None:
    """Refuses classes that are none of the kinds that a run is made of, before any is called.

    Raises:
        ConfigError: Naming the option and the class.
    """
    if _policy["trusted"]:
        return
    for option, path in _class_paths(config):
        option = option.replace("model.init_args.", "model.")  # where the model is named, too
        chosen = _CHOSEN.get(option, _KINDS)
        found = imported(path)
        if option == "model.lr_scheduler" and path.startswith("torch.") and path.endswith("OnPlateau"):
            raise ConfigError(
                f"{option}: {path} does not know what to watch; name "
                "lightning.pytorch.cli.ReduceLROnPlateau, with init_args.monitor"
            )
        kinds = _classes(chosen)
        base = found in kinds and chosen is not _KINDS  # torch.optim.Optimizer itself
        if found is None or (isinstance(found, type) and issubclass(found, kinds) and not base):
            continue
        expected = (
            " or ".join(name for _, name in chosen) if chosen is not _KINDS else "class of a run's parts"
        )
        raise ConfigError(
            f"{option}: {path} is no {expected}; name a class of that kind, or, if the configuration is "
            f"yours, add --{TRUST} true to the command line (or set {TRUST_VARIABLE}=1)"
        )


def _reason(path: str) -> str:
    top, ending = path.partition(".")[0], path.rpartition(".")[2]
    if ending in ("json", "yaml", "yml"):
        return f"{path}: no such file"
    if top in _NEVER:
        return f"{path} is not imported: a configuration may not name what belongs to Python or its tools"
    return (
        f"{path} is not imported: {top} is no installed package, and a configuration may name nothing else. "
        f"If the module is yours, add --{TRUST} true to the command line (or set {TRUST_VARIABLE}=1)"
    )


def _class_paths(config: Any, option: str = "") -> Iterator[tuple[str, str]]:
    """Yields every class path of a configuration with the option that it stands in."""
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, Mapping):
        path = config.get("class_path")
        if isinstance(path, str):
            yield option, path
        for name, value in config.items():
            yield from _class_paths(value, f"{option}.{name}" if option else str(name))
    elif isinstance(config, list | tuple):
        for number, value in enumerate(config):
            yield from _class_paths(value, f"{option}[{number}]")


def imported(path: str) -> Any:
    """Returns what a path names if it is imported already, else None: such a text has been left a text."""
    parts = path.split(".")
    for size in range(len(parts) - 1, 0, -1):
        found: Any = sys.modules.get(".".join(parts[:size]))
        if found is not None:
            for name in parts[size:]:
                found = getattr(found, name, None)
            return found
    return None


@cache
def _classes(kinds: tuple[tuple[str, str], ...]) -> tuple[type, ...]:
    from importlib import import_module

    return tuple(getattr(import_module(module), name) for module, name in kinds)


def _own_folders() -> Iterator[Path]:
    """Yields the folders of ``sys.path`` that are neither Python's nor those of installed packages."""
    places = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    places |= set(_package_folders())
    for entry in {"", *sys.path}:
        folder = Path(entry).resolve()
        if folder.is_dir() and folder not in places and folder.name != "lib-dynload":
            yield folder


def _package_folders() -> list[Path]:
    """Returns the folders that installers put packages in, those of a cluster's modules among them."""
    names = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
    if site.ENABLE_USER_SITE:
        names.append(site.getusersitepackages())
    names += [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    # Beside PyTorch and Lightning, wherever they are.
    files = [getattr(sys.modules.get(name), "__file__", None) for name in ("torch", "lightning")]
    names += [str(Path(file).parents[1]) for file in files if file]
    found = dict.fromkeys(folder for name in names if (folder := Path(name).resolve()).is_dir())
    return [folder for folder in found if folder != Path.cwd()]


def _installed_modules() -> Iterator[str]:
    """Yields the names of installed modules: in the folders of packages, or where an editable one lies."""
    folders = _package_folders()
    for folder in folders:
        yield from _modules_in(folder)
    for found in distributions(path=[str(folder) for folder in folders]):
        origin = loads(found.read_text("direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            folder = Path(unquote(urlparse(origin["url"]).path))
            yield from _modules_in(folder)
            yield from _modules_in(folder / "src")


def _modules_in(folder: Path) -> Iterator[str]:
    """Yields the names of the modules and packages in a folder."""
    try:
        entries = list(os.scandir(folder))
    except OSError:
        return
    for entry in entries:
        name, dot, ending = entry.name.partition(".")
        module = not dot if _is_folder(entry) else ending == "py" or ending.endswith(("so", "pyd"))
        if module and name.isidentifier() and name != "__pycache__":
            yield name


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link in a circle, or into a folder or a mount that cannot be read
        return False
