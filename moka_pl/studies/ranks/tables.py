"""Measured trainings as rows of a table."""

from collections.abc import Sequence
from typing import Any

#: The columns, and their widths on a terminal.
COLUMNS = {
    "shape": 12,
    "strategy": 20,
    "GPUs": 4,
    "rows": 4,
    "tokens/s": 9,
    "ratio": 5,
    "peak GiB": 8,
    "of ddp": 6,
    "first step s": 12,
    "checkpoint MB": 13,
    "its s": 5,
}


def heads() -> list[str]:
    """Returns the heads of the columns, as wide as these."""
    return _wide(list(COLUMNS))


def cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a row's cells, as wide as its columns.

    Args:
        row: The row.
        rows: All rows so far, some of which it is compared with.
    """
    return _wide(plain_cells(row, rows))


def plain_cells(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns a row's cells: speed beside one GPU's and beside DDP's, and so its peak.

    Args:
        row: The row.
        rows: Rows that it is compared with.
    """
    limit = "" if row["memory_limit"] is None else f", {row['memory_limit']:g} GiB"
    strategy = row["strategy"]
    if row["resumes"] is not None:
        strategy = f"{row['resumes'][0]} x {row['resumes'][1]} → {strategy}"
    strategy += ", CUDA graphs" if row["cuda_graphs"] else ""
    strategy += ", offload" if row.get("offload") else ""  # which older results do not tell
    known = [row["shape"], strategy + limit, str(row["devices"]), str(row["batch_size"])]
    if "error" in row:
        return [*known, row["error"]]
    alone = _beside(row, rows, strategy=row["strategy"], devices=1)
    ddp = _beside(row, rows, strategy="ddp", devices=row["devices"])
    speed, peak = row["tokens_per_second"], row["peak_gib"]
    of_ddp = ""
    if ddp is not None and ddp is not row:
        of_ddp = f"{speed / ddp['tokens_per_second']:.2f}, {peak / ddp['peak_gib']:.2f}"
    saving = row["checkpoint_seconds"]
    return [
        *known,
        f"{speed:,.0f}",
        "" if alone is None else f"{speed / alone['tokens_per_second']:.2f}",
        f"{peak:.2f}",
        of_ddp,
        f"{row['first_step_seconds']:.1f}",
        f"{row['checkpoint_mb']:.1f}",
        "" if saving is None else f"{saving:.2f}",
    ]


def _beside(row: dict[str, Any], rows: Sequence[dict[str, Any]], **other: Any) -> dict[str, Any] | None:
    """Returns the row that differs in the given options alone."""
    same = ("shape", "batch_size", "memory_limit", "resumes", "strategy", "devices", "cuda_graphs", "offload")
    wanted = {name: other.get(name, row.get(name, False)) for name in same}
    found = (r for r in rows if "error" not in r and all(r.get(n, False) == wanted[n] for n in same))
    return next(found, None)


def _wide(cells: Sequence[str]) -> list[str]:
    return [cell.rjust(width) for cell, width in zip(cells, COLUMNS.values(), strict=False)]
