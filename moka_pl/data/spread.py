"""A few rows of every task."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset


def spread(rows: "Dataset", limit: int) -> "Dataset":
    """At most `limit` rows of every task, evenly spread over its rows.

    Args:
        rows: With the column `task`.
        limit: Most rows of a task.

    Returns:
        The chosen rows in their old order.
    """
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(rows["task"][:]):
        by_task.setdefault(task, []).append(index)
    chosen: list[int] = []
    for indices in by_task.values():
        count = min(limit, len(indices))
        chosen += [indices[step * len(indices) // count] for step in range(count)]
    return rows.select(sorted(chosen))
