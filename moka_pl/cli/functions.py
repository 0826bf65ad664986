"""Turns a plain function into a command."""

from collections.abc import Callable, Sequence
from inspect import signature
from typing import TYPE_CHECKING, Any

from moka_pl.cli.evaluate import evaluate
from moka_pl.cli.generate import generate
from moka_pl.cli.inspect import inspect

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

#: Commands that are plain functions.
FUNCTIONS: dict[str, Callable[..., None]] = {"inspect": inspect, "generate": generate, "evaluate": evaluate}


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


def run_function(name: str, arguments: Sequence[str]) -> None:
    """Parses the arguments of a function's command and runs it."""
    parser = function_parser(name)
    config = parser.instantiate_classes(parser.parse_args(list(arguments)))
    FUNCTIONS[name](**config.as_dict())


def _summary(name: str) -> str:
    return (FUNCTIONS[name].__doc__ or "").strip().splitlines()[0]
