"""Which lengths share a row."""

from collections import defaultdict
from collections.abc import Sequence


def best_fit_decreasing(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Packs lengths into rows: the longest first, each into the fullest row that still has room for it.

    How many rows there are, and which lengths stand in each, depends on how often each length occurs alone,
    not on the order of `lengths`.

    Args:
        lengths: Lengths (tokens), from 1 to `capacity`.
        capacity: Room of a row (tokens).

    Returns:
        Per row the indices into `lengths`, the longest first.

    Raises:
        ValueError: If a length is out of range.
    """
    rows: list[list[int]] = []
    by_room: dict[int, list[int]] = defaultdict(list)
    rooms = 0  # bit r: there is a row with room r
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"a length must be from 1 to {capacity}, got {length}.")
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the least that is enough
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            by_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows
