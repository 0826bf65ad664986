"""The command line: Lightning's own commands on :class:`MokaModule`, and a few plain functions.

Only what parsing needs is imported here; the plain functions never import Lightning.
"""

import os
import select
import sys
from collections.abc import Sequence

from moka_pl.cli.functions import FUNCTIONS, run_function
from moka_pl.errors import MokaError, end_interrupted

_STDOUT = 1
#: The status that a shell reports of programs that, unlike Python, are ended by writing to a closed pipe.
_KILLED_BY_SIGPIPE = 128 + 13


def main(args: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        args: Arguments, default those of the process. Errors of the user end it with status 2 and one line;
            a reader of the output that has gone (``| head``) ends it in silence.
    """
    try:
        try:
            _run(args)
        except SystemExit:
            _flush()
            raise
        _flush()
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # What is still buffered goes nowhere, rather than into a complaint at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), _STDOUT)
        sys.exit(_KILLED_BY_SIGPIPE)


def _run(args: Sequence[str] | None) -> None:
    arguments = list(sys.argv[1:] if args is None else args)
    # Threads of tokenisation and of data loading workers would otherwise warn about each other.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        if arguments and arguments[0] in FUNCTIONS:
            run_function(arguments[0], arguments[1:])
        else:
            from moka_pl.cli.lightning import run

            run(None if args is None else arguments)
    except MokaError as error:
        print(f"moka_pl: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # outside of training, which sees to its own
        end_interrupted()


def _flush() -> None:
    """Writes what is buffered here, where a closed pipe can be handled, not at the interpreter's end."""
    print(end="", flush=True)


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader; other pipes break, too (that of a data loader's worker)."""
    poll = select.poll()
    poll.register(_STDOUT, 0)  # errors only
    return bool(poll.poll(0))
