"""The table: a training step of every row."""

from collections.abc import Iterator, Sequence

from moka_pl.benchmark.bench import Bench
from moka_pl.benchmark.presets import Preset
from moka_pl.benchmark.records import Record
from moka_pl.benchmark.rows import FROZEN, Row
from moka_pl.benchmark.timing import time_steps


def measure_steps(bench: Bench, preset: Preset, rows: Sequence[Row]) -> Iterator[Record]:
    """Measures the rows one after another on the same model and batch.

    Args:
        bench: The model.
        preset: Batch and steps.
        rows: What to measure; ratios are to the row ``frozen base``, if it comes first.

    Yields:
        A record a row.
    """
    base = None
    for row in rows:
        values, error = bench.measure(
            row,
            lambda model: time_steps(
                model, preset.batch, preset.length, preset.warmup, preset.steps, preset.seconds
            ),
        )
        if row.name == FROZEN:
            base = values.get("step_ms")
        if base is not None and values:
            values["ratio"] = values["step_ms"] / base
        yield Record("steps", row.name, bench.checkpointing, {}, values, error)
