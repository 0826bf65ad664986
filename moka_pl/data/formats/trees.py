"""Message trees (OASST1): flat messages that name their parents, joined to chats."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from typing import Any, Literal

from moka_pl.data.formats.base import Fields, Record, brief, has_value, ignored_in, require, require_text
from moka_pl.data.formats.messages import WEIGHTS
from moka_pl.data.readers import Located, located
from moka_pl.errors import DataError, printable

TreePaths = Literal["best", "all"]
"""Chats of a message tree: that of the best-ranked replies, or one for each last reply."""

FIELDS = ("message_id", "parent_id", "role", "text")
"""Columns that identify a flat message."""

_USED = (*FIELDS, *WEIGHTS, "lang", "rank", "deleted")
_ROLES = {"prompter": "user", "assistant": "assistant", "system": "system"}


def is_tree_message(record: Record) -> bool:
    """Returns whether a record is one message of a tree."""
    return all(field in record for field in FIELDS)


def join_trees(
    records: Iterable[Located], paths: TreePaths = "best", language: str | None = "en"
) -> Iterator[Located]:
    """Turns the flat messages of a source into chats; other records pass as they are.

    A chat has its first message's location and ends at a reply of the assistant; what users wrote after the
    last one is left out, and so are deleted messages and all that follows them.

    Args:
        records: All records of a source with their locations. What the first one is, all must be.
        paths: "best" follows the best-ranked (else the first) reply from message to message; "all" gives one
            chat for every last reply of a tree.
        language: Keep the trees whose first message is in this language (column ``lang``); None keeps all.

    Raises:
        DataError: A message has no text, an unknown role or an unknown parent, or no tree is in the language.
    """
    records = iter(records)
    first = next(records, None)
    if first is None:
        return
    if not is_tree_message(first[1]):
        yield from chain([first], records)
        return
    messages: dict[str, Located] = {}
    children: dict[str | None, list[str]] = defaultdict(list)
    for location, record in chain([first], records):
        with located(location):
            _check(record)
            if record["message_id"] in messages:
                raise DataError(
                    f"field 'message_id' is {brief(record['message_id'])} again. Remove one of them"
                )
        messages[record["message_id"]] = location, record
        children[record["parent_id"] or None].append(record["message_id"])
    for parent, replies in children.items():
        if parent is not None and parent not in messages:
            location = messages[replies[0]][0]
            raise DataError(
                f"{location}: field 'parent_id' names {brief(parent)}, but there is no such message"
            )
    languages = {str(messages[root][1].get("lang")) for root in children[None]}
    roots = [
        root
        for root in children[None]
        if language is None or messages[root][1].get("lang") in (None, language)
    ]
    if not roots:
        raise DataError(
            f"{first[0]} and the following messages: no tree in the language {language!r}; found: "
            f"{printable(', '.join(sorted(languages)), 200)}. Change `tree_language`"
        )
    for root in roots:
        for path in _paths(root, messages, children, paths):
            chat = [messages[name][1] for name in path]
            yield (
                messages[root][0],
                Fields({"messages": [_message(record) for record in chat]}, _others(chat)),
            )


def _check(record: Record) -> None:
    for field in FIELDS:
        require(record, field, f"{field!r} of a message tree")
    for field in ("message_id", "text"):
        require_text(record, field)
    if record["role"] not in _ROLES:
        raise DataError(
            f"field 'role' is {brief(record['role'])}; known roles of message trees are {', '.join(_ROLES)}"
        )


def _paths(
    root: str, messages: Mapping[str, Located], children: Mapping[str | None, list[str]], paths: TreePaths
) -> list[list[str]]:
    """Returns the chats of one tree as lists of message ids, each ending at an assistant's reply."""
    complete: dict[tuple[str, ...], None] = {}  # a set in order
    open_paths = [[root]] if not _deleted(messages[root][1]) else []
    while open_paths:
        path = open_paths.pop()
        replies = [name for name in children.get(path[-1], []) if not _deleted(messages[name][1])]
        replies.sort(key=lambda name: _rank(messages[name][1]))
        if replies:
            # The last one is taken next, so that chats come in the order of their replies.
            open_paths += [[*path, name] for name in (replies[:1] if paths == "best" else replies[::-1])]
            continue
        while path and messages[path[-1]][1]["role"] != "assistant":
            path.pop()
        if path:
            complete[tuple(path)] = None
    return [list(path) for path in complete]


def _deleted(record: Record) -> bool:
    return str(record.get("deleted")).strip().lower() in ("true", "1", "1.0")  # CSV files hold it as text


def _rank(record: Record) -> float:
    rank = record.get("rank")
    return float("inf") if rank is None or rank == "" else float(rank)


def _message(record: Record) -> dict[str, Any]:
    weights = {name: record[name] for name in WEIGHTS if name in record}
    return {"role": _ROLES[record["role"]], "content": record["text"], **weights}


def _others(records: Iterable[Record]) -> Counter[str]:
    """Counts the fields of messages that have no meaning here."""
    ignored: Counter[str] = Counter()
    for record in records:
        ignored += ignored_in(record)
        ignored.update(name for name in record if name not in _USED and has_value(record, name))
    return ignored
