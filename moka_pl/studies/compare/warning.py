"""Warnings of a comparison."""

import sys


def warn(text: str) -> None:
    """Prints a warning on stderr."""
    print(f"compare: warning: {text}", file=sys.stderr, flush=True)
