"""``moka-pl configs``: the configurations that come with the package, found by their names."""

import shutil
from pathlib import Path

from moka_pl.errors import ConfigError
from moka_pl.utils import unwritable_reason


def configs(copy: Path | None = None, overwrite: bool = False) -> None:
    """List the shipped configurations, or copy them.

    Args:
        copy: Folder to copy them to; it is created if missing.
        overwrite: Replace existing files.
    """
    files = shipped_configs()
    if copy is None:
        width = max(map(len, files)) + 2
        for name, file in files.items():
            purpose = file.read_text(encoding="utf-8").partition("\n")[0].strip("# :")
            print(f"{name:<{width}}{purpose}")
        return
    if (reason := unwritable_reason(copy)) is not None:
        raise ConfigError(f"--copy {copy}: cannot write there ({reason}); choose another folder")
    present = [file.name for file in files.values() if (copy / file.name).exists()]
    if present and not overwrite:
        raise ConfigError(f"{copy} already has {', '.join(present)}; add --overwrite to replace them")
    try:
        for file in files.values():
            print(shutil.copy(file, copy))
    except OSError as error:
        raise ConfigError(f"cannot write to {copy}: {error.strerror or error}") from error


def shipped_configs() -> dict[str, Path]:
    """Returns the configurations by their names: the package's, or in a checkout those beside it."""
    package = Path(__file__).parents[1]
    folder = next(f for f in (package / "configs", package.parent / "configs") if f.is_dir())
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def find_config(given: str) -> str:
    """Returns the path of a file, or of a shipped one named as ``llama2`` or ``configs/llama2.yaml``.

    A file in the current folder comes first. What is no name at all (YAML itself) is returned as it is.

    Raises:
        ConfigError: If neither a file nor a shipped configuration has that name.
    """
    if Path(given).is_file() or ":" in given:
        return given
    shipped = shipped_configs()
    name = given.removeprefix("configs/").removesuffix(".yaml")
    if name not in shipped:
        reason = "is a folder" if Path(given).is_dir() else "no such file"
        raise ConfigError(f"--config {given}: {reason}; give a file, or one of {', '.join(shipped)}")
    return str(shipped[name])
