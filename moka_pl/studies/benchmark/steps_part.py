"""The table: a training step of every row."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from moka_pl.studies.benchmark.bench import Bench
from moka_pl.studies.benchmark.cases import Row
from moka_pl.studies.benchmark.presets import Preset
from moka_pl.studies.benchmark.records import Record, Values
from moka_pl.studies.benchmark.steps import time_steps

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_steps(bench: Bench, preset: Preset, rows: Sequence[Row]) -> Iterator[Record]:
    """Measures the rows one after another on the same model and batch.

    Args:
        bench: The model.
        preset: Batch and steps.
        rows: What to measure; ratios are to the row ``frozen base``, if it comes first.

    Returns:
        A record a row.
    """

    def work(model: "PreTrainedModel", row: Row) -> Values:
        size = preset.batch, preset.length, preset.warmup, preset.steps, preset.seconds
        return time_steps(model, *size, captured=row.captured)

    return bench.compare("steps", rows, "step_ms", work)
