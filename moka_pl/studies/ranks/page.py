"""Writes the section on several GPUs of ``docs/tuning.md`` from measured trainings."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from moka_pl.errors import ConfigError
from moka_pl.studies.benchmark.tables import render
from moka_pl.studies.common import Parser, first_line, one_line_errors, replace_section, write_atomically
from moka_pl.studies.outputs import has_keys
from moka_pl.studies.ranks.cases import BLOCK
from moka_pl.studies.ranks.runs import LENGTH
from moka_pl.studies.ranks.tables import COLUMNS, plain_cells

BEGIN, END = "<!-- several GPUs -->", "<!-- /several GPUs -->"

DESCRIPTION = f"""\
Rewrites the section between {BEGIN} and {END} from results of scripts/data_parallel_speed.py.

    python scripts/data_parallel_speed.py --groups ddp limited 13b 70b resume --json gpus.json
    python scripts/ranks_page.py gpus.json

Of trainings with the same options the last one counts; those that failed are left out.
"""


@one_line_errors("ranks_page")
def main(arguments: Sequence[str] | None = None) -> None:
    """Rewrites the section.

    Args:
        arguments: Default: the process's. Ends the process with status 2 on an error.
    """
    parser = Parser("ranks_page", DESCRIPTION)
    parser.add_argument("results", type=Path, nargs="+", help="files of --json")
    parser.add_argument("--page", type=Path, default=Path("docs/tuning.md"), help="the page")
    args = parser.parse_args(arguments)
    found = [_results(file) for file in args.results]
    try:
        text = section([row for one in found for row in one["rows"]], found[0]["versions"])
    except (AttributeError, KeyError, TypeError) as error:
        given = ", ".join(map(str, args.results))
        raise ConfigError(
            f"{given}: a training lacks what the page says of it ({first_line(error)})"
        ) from error
    page = args.page.read_text(encoding="utf-8")
    try:
        changed = replace_section(page, text, BEGIN, END)
    except ConfigError as error:
        raise ConfigError(f"{args.page} {error}") from None
    write_atomically(args.page, changed)


def _results(file: Path) -> dict[str, Any]:
    """Reads a file of measured trainings.

    Raises:
        ConfigError: It is something else.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    if not has_keys("versions", "rows")(found) or not found["rows"]:
        raise ConfigError(
            f"{file} has no trainings; write it with 'scripts/data_parallel_speed.py --json {file}'"
        )
    measured: dict[str, Any] = found
    return measured


def section(rows: Sequence[dict[str, Any]], versions: dict[str, str]) -> str:
    """Returns the text between the markers.

    Args:
        rows: Measured trainings.
        versions: Versions of the packages.

    Raises:
        ConfigError: None of them succeeded.
    """
    last = {tuple(plain_cells(row, [])[:4]): row for row in rows if "error" not in row}
    known = list(last.values())
    if not known:
        raise ConfigError("no training succeeded")
    used = ", ".join(f"{name} {versions[name]}" for name in ("torch", "lightning") if name in versions)
    by_device: dict[str, list[dict[str, Any]]] = {}
    for row in known:
        by_device.setdefault(row["device"], []).append(row)
    text = f"""\
Rows of {LENGTH} tokens ({used}). *Ratio* compares with one GPU, *of ddp* speed and peak with `ddp` on as
many; *first step* counts from the command; *its s* is what the training lost to writing a checkpoint. The
files say each row's options, and how many steps were timed, which the groups may have changed since.

```bash
python scripts/data_parallel_speed.py --groups ddp limited 13b 70b resume --json gpus.json
python scripts/ranks_page.py gpus.json
```

"""
    return text + "\n\n".join(_device(name, its) for name, its in by_device.items())


def _device(name: str, rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of one kind of GPU, and a sentence on each resumed training."""
    table = render(list(COLUMNS), [plain_cells(row, rows) for row in rows])
    resumed = [f"\n{_resumed(row)}" for row in rows if row["resumes"] is not None]
    shares = {row["devices"]: logging_share(row) for row in rows if row["cuda_graphs"]}
    told = ", ".join(f"{100 * share:+.1f}% on {n}" for n, share in shares.items() if share is not None)
    logging = (
        [f"\nReplayed steps that follow a log, as every fifth does, took longer by {told}."] if told else []
    )
    return "\n".join([f"On {name}:\n", table, *resumed, *logging])


def logging_share(row: dict[str, Any]) -> float | None:
    """Returns by which share of a step those after a log take longer on the first rank's GPU, on average.

    Args:
        row: A measured training.

    Returns:
        None where the GPU's times were not kept. First steps and the last do not count.
    """
    first = (row.get("steps") or [{}])[0]
    if not first.get("gpu_ms"):
        return None
    whole = [sum(parts) for parts in zip(*first["gpu_ms"].values(), strict=True)]
    times: dict[bool, list[float]] = {True: [], False: []}
    for step in range(row["warmup"], row["warmup"] + BLOCK * row["blocks"]):
        times[first["after_log"][step]].append(whole[step])
    return fmean(times[True]) / fmean(times[False]) - 1 if times[True] and times[False] else None


def _resumed(row: dict[str, Any]) -> str:
    """Says how a training went on from another one's checkpoint."""
    before, (strategy, devices) = row["before"], row["resumes"]
    first, last = before["losses"][0], before["losses"][-1]
    return (
        f"{row['shape']}, `{strategy}` on {devices} → `{row['strategy']}` on {row['devices']}: "
        f"stopped after step {before['ended_at']}, went on there (from step {row['begun_at']} to "
        f"{row['ended_at']}); the loss was {first:.3f} at first, {last:.3f} before and "
        f"{row['losses'][0]:.3f} after."
    )
