"""Markdown tables of results, and pictures of the growth measurements."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from moka_pl.studies.benchmark.bench import Record, Results
from moka_pl.studies.benchmark.cases import peer
from moka_pl.studies.benchmark.context import is_close
from moka_pl.studies.outputs import picture_output, save_figure


class Column(NamedTuple):
    """A column of a table.

    Attributes:
        title: Its head.
        cell: The text for a record.
    """

    title: str
    cell: Callable[[Record], str]


def milliseconds(value: float) -> str:
    """Milliseconds with three digits or more."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def number(key: str, form: str) -> Callable[[Record], str]:
    """A cell of a value in a format; empty where it was not measured."""
    return lambda record: format(record.values[key], form) if key in record.values else ""


def duration(key: str) -> Callable[[Record], str]:
    """A cell of milliseconds."""
    return lambda record: milliseconds(record.values[key]) if key in record.values else ""


def failure(record: Record) -> str:
    """What went wrong, as a cell."""
    return f"failed: {record.error}".replace("|", "\\|")


_ROW = Column("adapter", lambda record: record.row)
_KIND = Column("checkpointing", lambda record: "on" if record.checkpointing else "off")
_COMMON = [Column("peak GiB", number("peak_gib", ".2f")), Column("trainable", number("trainable", ",.0f"))]
RATE = Column("TFLOP/s", number("tflops", ",.3g"))
LAUNCHES = Column("launches", number("launches", ",.0f"))
GPU = Column("GPU ms", number("gpu_ms", ",.0f"))
#: How a row compares with the one of unsloth's that it competes with.
OF_TIME = Column("of unsloth's", number("unsloth_ratio", ".2f"))
OF_PEAK = Column("of its peak", number("unsloth_peak", ".2f"))
#: The same with PEFT's LoRA r8 on q and v, where rows were measured in turns.
OF_LORA = Column("of LoRA r8's", number("lora_ratio", ".2f"))
#: Columns that are left out where nothing was measured for them.
_OPTIONAL = (OF_LORA, OF_TIME, OF_PEAK, RATE, LAUNCHES, GPU)
STEPS = [
    _ROW,
    _KIND,
    Column("step ms", duration("step_ms")),
    Column("forward ms", duration("forward_ms")),
    Column("tokens/s", number("tokens_per_s", ",.0f")),
    *_COMMON,
    Column("ratio", number("ratio", ".2f")),
    OF_LORA,
    OF_TIME,
    OF_PEAK,
    RATE,
    LAUNCHES,
    GPU,
]
DECODE = [
    _ROW,
    Column("ms a token", duration("token_ms")),
    Column("tokens/s", number("tokens_per_s", ",.1f")),
    Column("prompt ms", duration("prompt_ms")),
    *_COMMON,
    Column("ratio", number("ratio", ".2f")),
]
FIT = [
    _ROW,
    _KIND,
    Column("fit ms", duration("fit_ms")),
    Column("bare ms", duration("bare_ms")),
    Column("ratio", number("ratio", ".3f")),
    Column("fit mean ms", duration("fit_mean_ms")),
    Column("bare mean ms", duration("bare_mean_ms")),
    Column("mean ratio", number("mean_ratio", ".3f")),
    Column("peak GiB", number("peak_gib", ".2f")),
    OF_TIME,
    OF_PEAK,
]
#: What the settings of the growth measurements are called.
GROWTH = {"components": "components", "tokens": "tokens", "sizes": "shape"}
TITLES = {
    "steps": "One training step (forward and backward)",
    "components": "A step over the number of components r (ms, peak GiB)",
    "tokens": "A step over the tokens of a batch (ms, peak GiB)",
    "sizes": "A step over shapes of models (ms, peak GiB)",
    "fit": "An optimizer step of fit beside a bare loop",
    "context": "Longest row of tokens of a step with checkpointing, over a card's GiB (ratio to unsloth's)",
    "decode": "Greedy generation at batch 1 with a key-value cache, adapters not merged",
}


def markdown(results: Results) -> str:
    """All tables of a run, each under a line that says what it shows."""
    parts = [f"{TITLES[measure]}\n\n{table}" for measure, table in tables(results).items()]
    return "\n\n".join([*parts, *(f"Note: {note}" for note in results.notes)])


def tables(results: Results) -> dict[str, str]:
    """The tables of what was measured, by measure."""
    by_measure = {measure: beside_unsloth(results, measure) for measure in TITLES}
    return {measure: _table(measure, records) for measure, records in by_measure.items() if records}


def beside_unsloth(results: Results, measure: str) -> list[Record]:
    """The records of a measure, with ratios to the rows of unsloth that they compete with.

    Args:
        results: A run of the benchmark.
        measure: ``steps`` or ``fit``, whose records get ``unsloth_ratio`` of times and ``unsloth_peak`` of
            memory where both were measured; the others are as they are.
    """
    if measure not in ("steps", "fit"):
        return results.of(measure)
    theirs = {(r.row, r.checkpointing): r.values for r in results.of("steps") if r.values}
    compared = []
    for record in results.of(measure):
        other = theirs.get((peer(record.row) or "", record.checkpointing))
        if other and record.values:
            time = record.values["step_ms" if measure == "steps" else "fit_ms"]
            ratios = {
                "unsloth_ratio": time / other["step_ms"],
                "unsloth_peak": record.values["peak_gib"] / other["peak_gib"],
            }
            record = replace(record, values=record.values | ratios)
        compared.append(record)
    return compared


def _table(measure: str, records: Sequence[Record]) -> str:
    if measure == "context":
        return context_table(records)
    if measure in GROWTH:
        return growth_table(records, GROWTH[measure])
    return plain_table(records, {"steps": STEPS, "fit": FIT, "decode": DECODE}[measure])


def measured(columns: Sequence[Column], records: Sequence[Record]) -> list[Column]:
    """The columns without those that few runs measure, where none of the records has them."""
    return [c for c in columns if c not in _OPTIONAL or any(map(c.cell, records))]


def plain_table(records: Sequence[Record], columns: Sequence[Column]) -> str:
    """A line a record; a failed one says why in its third column, where there are numbers otherwise."""
    columns = measured(columns, records)
    named = sum(column in (_ROW, _KIND) for column in columns)
    lines = []
    for record in records:
        cells = [column.cell(record) for column in columns]
        if record.error is not None:
            cells[named] = failure(record)
        lines.append(cells)
    return render([column.title for column in columns], lines)


def growth_table(records: Sequence[Record], setting: str) -> str:
    """A line a row, a column a setting; a cell holds step time and peak memory."""
    settings = list(dict.fromkeys(record.setting[setting] for record in records))
    rows = list(dict.fromkeys((record.row, record.checkpointing) for record in records))
    cells = {(r.row, r.checkpointing, r.setting[setting]): _growth_cell(r) for r in records}
    both = len({record.checkpointing for record in records}) > 1
    lines = []
    for name, checkpointing in rows:
        label = f"{name}, checkpointing" if both and checkpointing else name
        lines.append([label, *(cells.get((name, checkpointing, value), "") for value in settings)])
    heads = [f"{value:,}" if isinstance(value, int) else value for value in settings]
    return render([f"adapter \\ {setting}", *heads], lines)


def context_table(records: Sequence[Record]) -> str:
    """A line a row, a column a card; ``≈`` marks what is predicted, the bounds before it were measured."""
    cards = sorted({record.setting["gib"] for record in records})
    found = {(r.row, r.setting["gib"]): r for r in records}
    lines = []
    for name in dict.fromkeys(record.row for record in records):
        line = [name]
        for card in cards:
            record, other = found.get((name, card)), found.get((peer(name) or "", card))
            cell = "" if record is None else longest(record)
            if record is not None and other is not None and _is_known(record) and _is_known(other):
                exact = _is_measured(record) and _is_measured(other)
                ratio = record.values["predicted"] / other.values["predicted"]
                cell += f" ({'' if exact else '≈ '}{ratio:.2f})"
            line.append(cell)
        lines.append(line)
    return render(["adapter \\ GiB", *map(str, cards)], lines)


def longest(record: Record) -> str:
    """The longest row of tokens that was found."""
    if record.error is not None:
        return failure(record)
    values = record.values
    if _is_measured(record):
        return f"{values['tokens']:,.0f}"
    bounds = [f"≥ {values['tokens']:,.0f}"]
    if "too_long" in values:
        bounds.append(f"< {values['too_long']:,.0f}")
    if values["predicted"] > values["tokens"]:
        bounds.append(f"≈ {values['predicted']:,.0f}")
    return ", ".join(bounds)


def _is_measured(record: Record) -> bool:
    """Whether a length that fits and one that does not are close."""
    values = record.values
    return "too_long" in values and is_close(values["tokens"], values["too_long"])


def _is_known(record: Record) -> bool:
    """Whether there is a longest length, measured or predicted."""
    return bool(record.values) and (
        _is_measured(record) or record.values["predicted"] > record.values["tokens"]
    )


def _growth_cell(record: Record) -> str:
    if record.error is None:
        return f"{milliseconds(record.values['step_ms'])}, {record.values['peak_gib']:.1f}"
    return "out of memory" if "out of memory" in record.error.lower() else failure(record)


def render(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rule = "|".join("---" for _ in heads)
    body = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([f"| {' | '.join(heads)} |", f"|{rule}|", *body])


class _Look(NamedTuple):
    file: str
    label: str
    log_x: bool
    log_y: bool


_LOOKS = {
    "components": _Look("growth_components.png", "components r", True, False),
    "tokens": _Look("growth_tokens.png", "tokens of a batch", True, True),
    "sizes": _Look("growth_sizes.png", "shape of the model", False, True),
}
_PANELS = {"step_ms": "forward and backward, ms", "peak_gib": "peak memory, GiB"}


def figures_output(text: str) -> Path:
    """The type of an option for the folder of :func:`write_figures`, in which all of them can be written."""
    for look in _LOOKS.values():
        picture_output(str(Path(text) / look.file))
    return Path(text)


def write_figures(results: Results, folder: Path) -> list[Path]:
    """Draws time and memory over components, tokens and shapes, as far as they were measured.

    Args:
        results: A run of the benchmark.
        folder: Where to write; it is made if need be.

    Returns:
        The PNG files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for measure, look in _LOOKS.items():
        records = [record for record in results.of(measure) if record.error is None]
        if records:
            _draw(results, measure, records, folder / look.file)
            written.append(folder / look.file)
    return written


def _draw(results: Results, measure: str, records: Sequence[Record], file: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    look, key = _LOOKS[measure], GROWTH[measure]
    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    settings = list(dict.fromkeys(record.setting[key] for record in records if record.setting[key] != 0))
    curves = list(dict.fromkeys((record.row, record.checkpointing) for record in records))
    rows = list(dict.fromkeys(row for row, _ in curves))
    panels: Any = figure.subplots(1, len(_PANELS))
    for axis, (value, title) in zip(panels, _PANELS.items(), strict=True):
        for row, checkpointing in curves:
            points = [r for r in records if (r.row, r.checkpointing) == (row, checkpointing)]
            style = {
                "color": f"C{rows.index(row)}",
                "linestyle": "--" if checkpointing else "-",
                "label": f"{row}, checkpointing" if checkpointing else row,
            }
            if points[0].setting[key] == 0:  # the frozen base has no components: a level to compare with
                axis.axhline(points[0].values[value], **style | {"linestyle": ":"})
                continue
            x = [p.setting[key] if look.log_x else settings.index(p.setting[key]) for p in points]
            axis.plot(x, [p.values[value] for p in points], marker="o", markersize=4, **style)
        if look.log_x:
            axis.set_xscale("log", base=2)
            axis.set_xticks(settings, [f"{setting:,}" for setting in settings])
            axis.minorticks_off()
        else:
            axis.set_xticks(range(len(settings)), settings)
        if look.log_y and value == "step_ms":
            axis.set_yscale("log")
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
            axis.yaxis.set_minor_formatter(NullFormatter())
        else:
            axis.set_ylim(0, 1.05 * max(record.values[value] for record in records))
        axis.set_xlabel(look.label)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8)
    preset = results.preset
    size = f"{preset['batch']} × {preset['length']} tokens"
    about = {"components": f"{preset['shape']}, {size}", "tokens": preset["shape"], "sizes": size}
    figure.suptitle(f"{about[measure]}, NF4, {results.dtype}, {results.device}", fontsize=11)
    save_figure(figure, file)
