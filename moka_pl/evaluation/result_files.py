"""Writes the results of an evaluation beside those of earlier ones."""

import os
import secrets
from contextlib import suppress
from itertools import count
from pathlib import Path

from moka_pl.errors import ConfigError
from moka_pl.utils import sync_file, write_failure


def write_results(file: Path, text: str) -> Path:
    """Writes results whole under a name that no file has: ``test.json``, or else ``test_2.json`` and so on.

    Returns:
        Where they are.

    Raises:
        ConfigError: If they cannot be written. Nothing of them is then left.
    """
    part = file.with_name(f".{file.name}.{secrets.token_hex(4)}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with part.open("x", encoding="utf-8") as opened:
            opened.write(text)
        sync_file(part)
        names = (file if n == 1 else file.with_stem(f"{file.stem}_{n}") for n in count(1))
        return next(name for name in names if _is_named(part, name))
    except OSError as error:
        raise ConfigError(
            f"cannot write the results, which are printed above, to {file}: "
            f"{write_failure(error, file.parent)}. Free some space, or choose another "
            "--trainer.logger.init_args.save_dir"
        ) from error
    finally:
        with suppress(OSError):
            part.unlink()


def _is_named(part: Path, name: Path) -> bool:
    """Gives a file a name; False if another has it, even from a process that writes at the same moment."""
    try:
        os.link(part, name)
    except FileExistsError:
        return False
    except OSError:  # the file system has no hard links
        if os.path.lexists(name):
            return False
        part.rename(name)
    return True
