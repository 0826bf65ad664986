"""Pictures of the growth measurements."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from moka_pl.studies.benchmark.records import Record, Results
from moka_pl.studies.benchmark.tables import GROWTH


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    look, key = _LOOKS[measure], GROWTH[measure]
    # Without pyplot: no global state, no display.
    figure = Figure(figsize=(11, 4.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    places = list(dict.fromkeys(record.setting[key] for record in records if record.setting[key] != 0))
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
            x = [p.setting[key] if look.log_x else places.index(p.setting[key]) for p in points]
            axis.plot(x, [p.values[value] for p in points], marker="o", markersize=4, **style)
        if look.log_x:
            axis.set_xscale("log", base=2)
            axis.set_xticks(places, [f"{place:,}" for place in places])
            axis.minorticks_off()
        else:
            axis.set_xticks(range(len(places)), places)
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
    figure.savefig(file)
