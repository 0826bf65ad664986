"""An adapter's metrics as a table: a row for all, a set or a task, a column a kind of metric."""

from collections.abc import Mapping
from typing import NamedTuple

#: Kinds of metrics in the order of their columns; of shares, which are shown in per cent, those that say so.
KINDS = {
    "loss": False,
    "accuracy": True,
    "acc_norm": True,
    "nll": False,
    "generated": True,
    "perplexity": False,
    "word_perplexity": False,
    "byte_perplexity": False,
}
_ERROR, _MACRO = "_stderr", "_macro"


class MetricTable(NamedTuple):
    """Formatted metrics.

    Attributes:
        title: What the metrics are of, such as ``val``; empty where they have no such word in common.
        columns: Kinds of metrics.
        rows: Name and cells of every row; of what a row has not, the cell is empty.
    """

    title: str
    columns: list[str]
    rows: list[tuple[str, list[str]]]


def metric_table(metrics: Mapping[str, float]) -> MetricTable:
    """Arranges metrics such as ``val/accuracy/boolean`` and ``val/accuracy/boolean_stderr``.

    Shares are in per cent, with their standard errors behind ±. The first row is over all tasks and sets.

    Args:
        metrics: Values by name, as in ``adapter_config.json``.
    """
    firsts = {name.partition("/")[0] for name in metrics if "/" in name}
    title = firsts.pop() if len(firsts) == 1 else ""
    cells: dict[str, dict[str, str]] = {}
    for name, value in metrics.items():
        if name.endswith(_ERROR) and name.removesuffix(_ERROR) in metrics:
            continue
        parts = name.removeprefix(f"{title}/").split("/")
        kind = next((part for part in reversed(parts) if part in KINDS), "value")
        row = "/".join(part for part in parts if part != kind) or "mean"
        row = f"{row.removesuffix(_MACRO)}, mean of its tasks" if row.endswith(_MACRO) else row
        cells.setdefault(row, {})[kind] = _shown(kind, value, metrics.get(name + _ERROR))
    columns = [kind for kind in (*KINDS, "value") if any(kind in of for of in cells.values())]
    rows = sorted(cells, key=lambda row: row != "mean")
    return MetricTable(
        title, columns, [(row, [cells[row].get(kind, "") for kind in columns]) for row in rows]
    )


def _shown(kind: str, value: float, error: float | None) -> str:
    if not KINDS.get(kind, False):
        return f"{value:.4f}"
    return f"{100 * value:.1f}%" + ("" if error is None else f" ± {100 * error:.1f}")
