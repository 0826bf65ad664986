"""How step time and memory grow with components, tokens and the size of the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moka_pl.studies.benchmark.bench import Bench, Record, Setting
from moka_pl.studies.benchmark.cases import FROZEN, QV, Preset, Row, choose, frozen, lora, moka
from moka_pl.studies.benchmark.steps import time_steps

#: Longest row of a batch; more tokens make more rows.
_LONGEST = 512


@dataclass(frozen=True)
class _Point:
    row: Row
    setting: Setting
    batch: int
    length: int


def growth_rows(device: str) -> list[str]:
    """Names of all rows of the growth measurements."""
    names = [FROZEN, *_backends("MoKA", device), *_backends("MoKA r10", device), "LoRA r64 q,v"]
    return list(dict.fromkeys(names))


def grow_components(bench: Bench, preset: Preset, names: Sequence[str]) -> Iterator[Record]:
    """Measures over the number of components r; the frozen base stands at r = 0.

    Args:
        bench: The model.
        preset: Batch, steps and values of r.
        names: Only these rows, or all for none.

    Yields:
        A record a row and r.
    """
    points = [(frozen(), 0)]
    for name, backend in _backends("MoKA", preset.device).items():
        points += [(moka(name, components=r, backend=backend), r) for r in preset.components]
    yield from _grow(
        bench,
        preset,
        "components",
        [
            _Point(row, {"components": r}, preset.batch, preset.length)
            for row, r in points
            if choose([row], names)
        ],
    )


def grow_tokens(bench: Bench, preset: Preset, names: Sequence[str]) -> Iterator[Record]:
    """Measures over the tokens of a batch.

    Args:
        bench: The model.
        preset: Steps and numbers of tokens.
        names: Only these rows, or all for none.

    Yields:
        A record a row and number of tokens.
    """
    rows = [frozen()]
    rows += [moka(name, backend=backend) for name, backend in _backends("MoKA r10", preset.device).items()]
    points = []
    for tokens in preset.tokens:
        length = min(tokens, _LONGEST)
        setting: Setting = {"tokens": tokens}
        points += [_Point(row, setting, tokens // length, length) for row in choose(rows, names)]
    yield from _grow(bench, preset, "tokens", points)


def grow_sizes(
    preset: Preset, checkpointing: bool, names: Sequence[str], offload: bool = False
) -> Iterator[Record | str]:
    """Measures over the shapes of models.

    Args:
        preset: Batch, steps and shapes.
        checkpointing: Compute activations again in the backward pass.
        names: Only these rows, or all for none.
        offload: With checkpointing, keep the layers' inputs in the host's memory.

    Yields:
        A record a row and shape; notes on the models.
    """
    rows = choose([frozen(), moka("MoKA r10"), lora("LoRA r64 q,v", 64, QV)], names)
    for shape in preset.shapes if rows else ():
        bench = Bench(shape, preset.device, checkpointing, offload)
        points = [_Point(row, {"shape": shape}, preset.batch, preset.length) for row in rows]
        yield from _grow(bench, preset, "sizes", points)
        bench.close()
        yield from bench.notes


def _grow(bench: Bench, preset: Preset, measure: str, points: Sequence[_Point]) -> Iterator[Record]:
    for point in points:
        values, error = bench.measure(
            point.row,
            lambda model, point=point: time_steps(  # type: ignore[misc]
                model, point.batch, point.length, preset.warmup, preset.steps, preset.seconds
            ),
        )
        yield Record(measure, point.row.name, bench.checkpointing, point.setting, values, error)


def _backends(prefix: str, device: str) -> dict[str, str]:
    """Backends by the name of their row."""
    names = ["structured", "dense", *(["fused"] if device == "cuda" else [])]
    return {prefix: "auto"} | {f"{prefix} {name}": name for name in names}
