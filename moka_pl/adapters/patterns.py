"""Which modules a pattern names: a list of dotted suffixes, or a regular expression, perhaps a stranger's."""

import difflib
import re
import time
from collections.abc import Iterable, Iterator

import regex

from moka_pl.adapters.schema import shown
from moka_pl.errors import AdapterError

#: Seconds that matching a regular expression with all names of a model may take.
MATCHING_TIME = 2.0
#: Longer expressions are refused; one that names every layer of a large model is shorter.
_LONGEST = 100_000

Pattern = list[str] | str | None


def matching(names: Iterable[str], pattern: Pattern) -> list[str]:
    """Returns the full names that a pattern matches, in their order.

    Args:
        names: Full names of modules.
        pattern: A list of dotted suffixes, a regular expression for whole names, or None for nothing.

    Raises:
        AdapterError: If the expression is invalid, or takes too long.
    """
    if isinstance(pattern, str):
        return list(_matched(pattern, names))
    suffixes = set(pattern or ())
    return [name for name in names if not suffixes.isdisjoint(_suffixes(name))]


def unmatched(names: Iterable[str], pattern: Pattern) -> list[str]:
    """Returns the entries of a list of suffixes that match none of some names, each with the nearest one.

    Args:
        names: Full names of modules.
        pattern: A list of dotted suffixes; expressions, which are one entry, are not looked at.
    """
    if not isinstance(pattern, list):
        return []
    full = list(names)
    known = {suffix for name in full for suffix in _suffixes(name)}
    last = {name.rpartition(".")[2] for name in full}
    told = []
    for entry in pattern:
        if entry in known:
            continue
        near = difflib.get_close_matches(entry, last, n=1, cutoff=0.6)
        told.append(f"{entry} (did you mean {near[0]}?)" if near else entry)
    return told


def compile_pattern(pattern: str) -> "regex.Pattern[str]":
    """Compiles a regular expression.

    Raises:
        AdapterError: If it is invalid or absurdly long.
    """
    if len(pattern) > _LONGEST:
        raise AdapterError(
            f"the regular expression {shown(pattern)} has {len(pattern):,} characters; at most {_LONGEST:,}"
        )
    try:
        re.compile(pattern)  # the dialect that is documented, and PEFT's
        return regex.compile(pattern)
    except (re.error, regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise AdapterError(f"{shown(pattern)} is not a valid regular expression: {error}") from error


def is_simple(pattern: str) -> bool:
    """Whether any engine matches an expression with short names fast: few repetitions, none of a group."""
    return len(re.findall(r"[*+?{]", pattern)) <= 3 and re.search(r"\)[*+?{]|\\\d", pattern) is None


def _suffixes(name: str) -> Iterator[str]:
    """Yields a name and what follows each of its dots."""
    while name:
        yield name
        name = name.partition(".")[2]


def _matched(pattern: str, names: Iterable[str]) -> Iterator[str]:
    compiled, end = compile_pattern(pattern), time.monotonic() + MATCHING_TIME
    for name in names:
        try:
            if compiled.fullmatch(name, timeout=max(end - time.monotonic(), 0.01)):
                yield name
        except TimeoutError:
            raise AdapterError(
                f"the regular expression {shown(pattern)} takes too long to match the names of the model's "
                "layers; write it with fewer nested repetitions"
            ) from None
