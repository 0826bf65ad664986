"""The command line: Lightning's own commands on :class:`MokaModule`, and a few plain functions.

Only what parsing needs is imported here; the plain functions never import Lightning.
"""

import os
import sys
from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from moka_pl.commands import generate, inspect
from moka_pl.errors import MokaError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

#: Commands that are plain functions.
FUNCTIONS: dict[str, Callable[..., None]] = {"inspect": inspect, "generate": generate}


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments, default those of the process. Errors of the user end it with status 2 and one line.
    """
    arguments = list(sys.argv[1:] if args is None else args)
    # Threads of tokenisation and of data loading workers would otherwise warn about each other.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if arguments and arguments[0] in FUNCTIONS:
            _run_function(arguments[0], arguments[1:])
        else:
            from moka_pl.lightning_cli import run

            run(None if args is None else arguments)
    except MokaError as error:
        print(f"moka_pl: error: {error}", file=sys.stderr)
        sys.exit(2)


def function_parser(name: str) -> "ArgumentParser":
    """The parser of a plain function's command; its flags are given as ``--flag``, without a value."""
    from jsonargparse import ActionYesNo, ArgumentParser

    flags = {key for key, p in signature(FUNCTIONS[name]).parameters.items() if p.annotation is bool}
    described: Any = ArgumentParser()
    described.add_function_arguments(FUNCTIONS[name], as_positional=True)
    parser: Any = ArgumentParser(prog=f"moka_pl {name}", description=_summary(name))
    parser.add_function_arguments(FUNCTIONS[name], as_positional=True, skip=flags)
    for action in described._actions:
        if action.dest in flags:
            parser.add_argument(
                f"--{action.dest}", action=ActionYesNo, default=action.default, help=action.help
            )
    return parser  # type: ignore[no-any-return]


def _run_function(name: str, arguments: Sequence[str]) -> None:
    parser = function_parser(name)
    config = parser.instantiate_classes(parser.parse_args(list(arguments)))
    FUNCTIONS[name](**config.as_dict())


def _summary(name: str) -> str:
    return (FUNCTIONS[name].__doc__ or "").strip().splitlines()[0]
