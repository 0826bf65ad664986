"""The library lm_eval: whether it is there, and its talk at times when it has nothing to tell."""

import importlib.util
import logging
from contextlib import AbstractContextManager

from moka_pl.errors import ConfigError
from moka_pl.utils import quiet


def require_lm_eval() -> None:
    """Checks that lm_eval is installed, without importing it (which takes seconds).

    Raises:
        ConfigError: If it is not, with the command that installs it.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "the lm-evaluation-harness is not installed: pip install 'moka_pl[eval]' (or pip install lm_eval)"
        )


def quiet_lm_eval() -> AbstractContextManager[None]:
    """Without lm_eval's warnings (that a task is local, that a model is built already)."""
    return quiet("lm_eval", below=logging.ERROR)
