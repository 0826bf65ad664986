"""The parser of plain functions' commands, which tells a mistake in one line."""

from collections.abc import Sequence
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from moka_pl.cli.parsing.messages import told
from moka_pl.errors import printable

_MISSING = "the following arguments are required: "


class FunctionParser(ArgumentParser):
    """Ends a process with status 2 and one line, without the page of usage that would hide it.

    Args:
        several: Names of the positional arguments that may be left out.
        **options: Those of jsonargparse's parser.
    """

    def __init__(self, *args: Any, several: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **options)
        self._several = several

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Names the argument, its value and what it may be."""
        told = self._told(" ".join(message.split()))
        self.exit(2, f"moka_pl: error: {printable(told)} (all options: {self.prog} --help)\n")
        raise AssertionError  # exit does not return

    def _told(self, message: str) -> str:
        if message.startswith(_MISSING):
            missing = message.removeprefix(_MISSING).split(", ")
            return _MISSING + ", ".join(name for name in missing if name not in self._several)
        # What may be left out is null only in Python.
        return told(message.replace(" - Expected a <class 'NoneType'>", ""), self.get_defaults().keys())
