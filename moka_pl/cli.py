"""The command line: Lightning's own commands on :class:`MokaModule`, and a few plain functions.

Only what parsing needs is imported here; the plain functions never import Lightning.
"""

import os
import sys
from collections.abc import Sequence

from moka_pl.commands.parser import FUNCTIONS, run_function
from moka_pl.errors import MokaError


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
            run_function(arguments[0], arguments[1:])
        else:
            from moka_pl.lightning_cli import run

            run(None if args is None else arguments)
    except MokaError as error:
        print(f"moka_pl: error: {error}", file=sys.stderr)
        sys.exit(2)
