"""The command line: Lightning's own commands on :class:`MokaModule`, and a few plain functions.

A command is added by a file with a function and a line in ``FUNCTIONS``: its arguments and its help are made
from the function's signature and docstring. Only what parsing needs is imported here; the functions import
the rest when they are called, and only Lightning's commands import Lightning.
"""

import argparse
import select
import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from moka_pl.cli.configs import configs
from moka_pl.cli.evaluate import evaluate
from moka_pl.cli.export import export
from moka_pl.cli.failures import ranks, watch
from moka_pl.cli.failures.streams import check_words, discard_output, flush_output, open_streams
from moka_pl.cli.generate import generate
from moka_pl.cli.inspect import inspect
from moka_pl.cli.predict import predict
from moka_pl.errors import (
    INTERRUPTED,
    ConfigError,
    MokaError,
    MokaWarning,
    end_interrupted,
    printable,
    system_failure,
)
from moka_pl.training.accidents.lifeline import LOST
from moka_pl.utils import ended_by_signals, expanded, set_environment
from moka_pl.version import __version__

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser

#: Commands of Lightning's trainer; see ``lightning.py``.
LIGHTNING = {
    "fit": "Train adapters.",
    "validate": "Evaluate on the validation data.",
    "test": "Evaluate on the test data.",
}

#: Commands with the options of one of Lightning's.
PLAN = {"plan": "Tell what a fit would take: parameters, memory, steps and time."}

#: Commands that are plain functions.
FUNCTIONS: dict[str, Callable[..., None]] = {
    "predict": predict,
    "inspect": inspect,
    "generate": generate,
    "evaluate": evaluate,
    "export": export,
    "configs": configs,
}

#: How warnings are formatted without us.
_formatted = warnings.formatwarning

_STDOUT = 1
#: The status that a shell reports of programs that, unlike Python, are ended by writing to a closed pipe.
_KILLED_BY_SIGPIPE = 128 + 13


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line with these arguments, or those of the process.

    Errors of the user end it with status 2 and one line; a reader of the output that has gone (``| head``)
    ends it in silence.
    """
    open_streams()
    try:
        try:
            _run(args)
        except SystemExit as end:
            flush_output(failed=end.code not in (None, 0))
            raise
        flush_output()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        discard_output()
        sys.exit(_KILLED_BY_SIGPIPE)


def function_parser(name: str) -> "ArgumentParser":
    """Makes the parser of a plain function's command; its flags are given as ``--flag``, without a value.

    A parameter of one text or several takes all positional arguments that are left.
    """
    from docstring_parser import parse
    from jsonargparse import ActionYesNo

    from moka_pl.cli.parsing.function_parser import FunctionParser

    function = FUNCTIONS[name]
    described = parse(function.__doc__ or "")
    help_of = {argument.arg_name: argument.description for argument in described.params}
    flags, several = _flags(function), [p.name for p in _parameters(function) if p.annotation == _SEVERAL]
    parser = FunctionParser(prog=f"moka_pl {name}", description=described.short_description, several=several)
    parser.add_function_arguments(function, as_positional=True, skip={*flags, *several})
    for flag in flags:
        parser.add_argument(f"--{flag}", action=ActionYesNo, default=False, help=help_of[flag])
    for listed in several:
        parser.add_argument(listed, nargs="*", type=str, help=help_of[listed]).required = False
    return parser


def parse_function(name: str, arguments: Sequence[str]) -> dict[str, Any]:
    """Parses the arguments of a plain function's command.

    Positional ones may stand among the options, which argparse cannot do where their number is open.

    Raises:
        ConfigError: If a flag is given something else than true or false, or a path is empty.
    """
    options: list[str] = []
    positional: list[str] = []
    empty: set[str] = set()
    without_value = False
    rest = deque(arguments)
    while rest:
        word = rest.popleft()
        if word == "--":
            positional += rest
            break
        if not word.startswith("-"):
            positional.append(word)
        elif (flag := word.partition("=")[0].removeprefix("--")) in _flags(FUNCTIONS[name]):
            options.append(_flag(flag, word, rest))
        else:
            option, equals, value = word.partition("=")
            options.append(word)
            if not equals and word not in _ALONE and not word.startswith("--no_"):
                without_value = not rest
                value = rest.popleft() if rest else ""
                options += [] if without_value else [value]
            empty |= set() if value else {option.removeprefix("--")}
    # Only where it is needed: a command without positional arguments takes none.
    end = ["--"] if any(word.startswith("-") for word in positional) else []
    # An option whose value is missing would take a positional argument that follows.
    words = [*positional, *options] if without_value else [*options, *end, *positional]
    parsed = function_parser(name).parse_args(words).as_dict()
    paths = {key: value for key, value in parsed.items() if isinstance(value, Path)}
    empty |= {_parameters(FUNCTIONS[name])[0].name} if positional[:1] == [""] else set()
    for key in empty & paths.keys():
        raise ConfigError(f"{key} is empty; give a path (. is the folder where you are)")
    return parsed | {key: _at_home(key, path) for key, path in paths.items()}


def _flag(flag: str, word: str, rest: deque[str]) -> str:
    """Returns a flag as argparse takes it; true or false may follow it, as they do other options."""
    _, equals, value = word.partition("=")
    if not equals and rest and rest[0].lower() in ("true", "false"):
        value = rest.popleft()
    if value.lower() not in ("true", "false") and (equals or value):
        raise ConfigError(f"--{flag} must be true or false, not {value!r}")
    return f"--no_{flag}" if value.lower() == "false" else f"--{flag}"


def _at_home(name: str, path: Path) -> Path:
    """Puts the home folder in the place of ``~``, as shells do only where a word begins with it.

    Raises:
        ConfigError: If it is that of nobody known here.
    """
    found = expanded(path)
    if found.parts[:1] and found.parts[0].startswith("~"):
        raise ConfigError(f"{name} {path}: there is no user {found.parts[0][1:]}; correct the path")
    return found


_SEVERAL = str | Sequence[str]
#: Options that no value follows, beside flags.
_ALONE = ("-h", "--help")


def _parameters(function: Callable[..., None]) -> list[Parameter]:
    return list(signature(function).parameters.values())


def _flags(function: Callable[..., None]) -> list[str]:
    return [parameter.name for parameter in _parameters(function) if parameter.annotation is bool]


def _run(args: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if args is None else args)
    command = arguments[0] if arguments else ""
    warnings.formatwarning = _format_warning
    set_environment()
    try:
        check_words(arguments)
        if command in FUNCTIONS:
            with ended_by_signals():
                FUNCTIONS[command](**parse_function(command, arguments[1:]))
        elif command in ("-h", "--help"):
            _print_help()
        elif command == "--version":
            print(f"moka_pl {__version__}")
        elif command in PLAN:
            from moka_pl.cli.plan import plan

            plan(arguments[1:])
        elif command in LIGHTNING or command.startswith("-"):  # options may come first
            from moka_pl.cli.lightning import run

            run(None if args is None else arguments)
            watch.end(0)
            ranks.end_together()
        else:
            known = ", ".join([*LIGHTNING, *FUNCTIONS, *PLAN])
            raise ConfigError(
                f"unknown command {command!r}; choose one of {known}"
                if command
                else f"give a command: {known}"
            )
    except Exception as error:
        _end(error)
    except SystemExit as end:  # training, on a signal
        watch.end(end.code if isinstance(end.code, int) else int(end.code is not None))
        raise
    except KeyboardInterrupt:  # outside of training, which sees to its own
        watch.end(INTERRUPTED)
        end_interrupted()


def _end(error: Exception) -> NoReturn:
    """Ends a process that fails, and the others of its run; one of them tells why, if it can in one line."""
    message: str | None
    lost = ranks.is_lost_rank(error)
    ended = watch.heard() if lost else None
    by_another = False
    if ended is not None and ended.status != LOST:
        by_another, message, status = True, None, ended.status
    elif lost:
        message, status = ranks.lost_rank_message(error if ended is None else f"rank {ended.rank}"), 1
    elif isinstance(error, MokaError):
        message, status = str(error), error.status
    else:
        message = system_failure(error)
        status = 1 if message is None else 2
    told = not by_another and ranks.tells(status, lost)
    if told and message is not None:
        print(f"moka_pl: error: {printable(message)}", file=sys.stderr, flush=True)
    ranks.end_others(at_once=told)
    if not told:
        status = ranks.status_of_others(status)
    watch.end(status)
    if told and message is None:
        raise error
    sys.exit(status)


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Formats our own warnings without the place in the code, and those of others as ever."""
    if issubclass(category, MokaWarning):
        return f"moka_pl: warning: {message}\n"
    return _formatted(message, category, filename, lineno, line)


def _print_help() -> NoReturn:
    """Prints all commands with a line each, and ends the process."""
    parser = argparse.ArgumentParser(
        "moka_pl",
        description="Fine-tune 4-bit LLaMA models with MoKA.",
        epilog="All options of a command: moka_pl COMMAND --help",
    )
    parser.add_argument("--version", action="version", version=__version__, help="show the version and exit")
    commands = parser.add_subparsers(title="commands")
    summaries = {name: (function.__doc__ or "").partition("\n")[0] for name, function in FUNCTIONS.items()}
    for name, summary in (LIGHTNING | summaries | PLAN).items():
        commands.add_parser(name, help=summary)
    parser.print_help()
    sys.exit(0)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader; other pipes break, too (that of a data loader's worker)."""
    poll = select.poll()
    poll.register(_STDOUT, 0)  # errors only
    return bool(poll.poll(0))
