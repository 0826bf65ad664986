"""The pictures of the page: by layer, by component, over the run, singular values, two adapters."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from moka_pl.inspection.charts import (
    COLOURS,
    DIVERGING,
    LEVELS,
    SEQUENTIAL,
    Series,
    diverging,
    heat_map,
    legend,
    line_chart,
    number,
    panel,
    scale,
    sequential,
    tag,
    text,
    thinned,
)
from moka_pl.inspection.comparison import Comparison, LayerDifference
from moka_pl.inspection.history import find_log, read_gate_curves
from moka_pl.inspection.layers import Layer, short_labels
from moka_pl.inspection.report import Inspection, LayerNumbers
from moka_pl.inspection.text import sampled

T = TypeVar("T", LayerNumbers, LayerDifference, Layer)

#: Points of a gate's curve; smallest σ_i / σ_1 that is drawn.
_POINTS, _FLOOR = 40, 1e-4


def by_kind(layers: Iterable[T]) -> dict[str, list[T]]:
    """Groups layers by projection, in the model's order."""
    kinds: dict[str, list[T]] = {}
    for layer in layers:
        kind = layer.layer.kind if isinstance(layer, LayerNumbers) else layer.kind
        kinds.setdefault(kind, []).append(layer)
    return kinds


def kind_names(kinds: Iterable[str]) -> dict[str, str]:
    """Short names of projections, ``q_proj``; those that would share one keep the whole."""
    kinds = list(kinds)
    last = [kind.rpartition(".")[2] for kind in kinds]
    return {kind: name if last.count(name) == 1 else kind for kind, name in zip(kinds, last, strict=True)}


def _curves_by_layer(
    title: str, layers: Sequence[T], value: Callable[[T], float | None], number_of: Callable[[T], int]
) -> str:
    """A chart of one number over the layers, a curve a projection; empty where no layer has it."""
    kinds = by_kind(layers)
    names, series = kind_names(kinds), []
    for i, (kind, of) in enumerate(kinds.items()):
        points = [(float(number_of(one)), found) for one in of if (found := value(one)) is not None]
        if points:
            series.append(Series(names[kind], sorted(points), f"c{i % COLOURS}", i >= COLOURS))
    if not series:
        return ""
    ys = [y for one in series for _, y in one.points]
    # Entropies close to 1 would be one line on an axis from 0.
    bounds = (min(ys), max(ys)) if min(ys) > 0.8 * max(ys) > 0 else None
    keys = legend([(one.label, one.colour, one.dashed) for one in series])
    return panel(title, line_chart(series, title, "layer", bounds), keys)


def by_layer(one: Inspection) -> str:
    """Norms, ranks and gate entropies over the layers."""
    values: dict[str, Callable[[LayerNumbers], float | None]] = {
        "‖ΔW‖": lambda n: n.norm,
        "‖ΔW‖ / ‖W‖": lambda n: n.relative_norm,
        "stable rank of ΔW": lambda n: n.stable_rank,
        "entropy rank of ΔW": lambda n: None if n.spectrum is None else n.spectrum.entropy_rank,
        "gate entropy (1: uniform)": lambda n: n.layer.entropy,
    }
    panels = [
        _curves_by_layer(title, one.layers, value, lambda n: n.layer.number)
        for title, value in values.items()
    ]
    return _section("Updates by layer", "".join(panels))


def heat_maps(one: Inspection) -> str:
    """Gates and norms of all components, a pair of panels a projection."""
    gated = one.gated
    parts = []
    centre = 1 / len(one.layers[0].layer.alpha) if one.layers else 1.0
    extent = max((abs(a - centre) for layer in gated for a in layer.alpha.tolist()), default=0.0)
    names = kind_names(by_kind(one.layers))
    for kind, of in by_kind(one.layers).items():
        panels = ""
        if of[0].layer.entropy is not None:
            rows = [(n.layer, n.layer.alpha.tolist()) for n in of]
            ends = (f"{centre - extent:.3f}", f"1/r = {centre:.3f}", f"{centre + extent:.3f}")
            panels += panel(
                f"{names[kind]}: gates α",
                _components(rows, diverging(extent, centre), f"gates of {names[kind]}"),
                scale(*ends, DIVERGING),
            )
        if all(n.component_norms for n in of) and len(of[0].component_norms) > 1:
            largest = max(max(n.component_norms) for n in of)
            rows = [(n.layer, n.component_norms) for n in of]
            panels += panel(
                f"{names[kind]}: norms ‖s α (A ⊗ B)‖",
                _components(rows, sequential(largest), f"norms of components of {names[kind]}"),
                scale("0", "", number(largest), SEQUENTIAL),
            )
        if panels:
            parts.append(panels)
            parts.append(_shape_list(names[kind], [n.layer for n in of]))
    intro = "A row a layer, a column a component. All gates start at 1/r."
    return _section("Components", "".join(parts), intro)


def _components(
    rows: Sequence[tuple[Layer, Sequence[float]]], colour: Callable[[float], str], label: str
) -> str:
    titles = [
        [f"{layer.name}, {_component(layer, j)}: {value:.4g}" for j, value in enumerate(values)]
        for layer, values in rows
    ]
    named = [(str(layer.number) if layer.number >= 0 else "", values) for layer, values in rows]
    return heat_map(named, titles, colour, label)


def _component(layer: Layer, j: int) -> str:
    return f"component {j}" + (f" ({layer.shapes[j]})" if layer.shapes else "")


def _shape_list(name: str, layers: Sequence[Layer]) -> str:
    """Which shapes a projection's components have."""
    if len({layer.shapes for layer in layers}) > 1:
        told = tag("p", "They differ from layer to layer; each cell tells its own.")
    elif not layers[0].shapes:
        return ""
    else:
        # Components of one shape together: "0, 5: 24×24 ⊗ 24×24".
        of: dict[str, list[str]] = {}
        for i, shape in enumerate(layers[0].shapes):
            of.setdefault(str(shape), []).append(str(i))
        told = tag(
            "ul", "".join(tag("li", text(f"{', '.join(i)}: {s}")) for s, i in of.items()), class_="keys"
        )
    return panel(f"{name}: shapes A ⊗ B of components", told)


def gate_curves(one: Inspection) -> str:
    """Gates over the steps of the run, a small chart a layer."""
    gated = one.gated
    run = find_log(one.path) if gated else None
    found = None if run is None else read_gate_curves(run)
    curves = {} if found is None else found.by_layer()
    labels = dict(zip((n.name for n in one.layers), short_labels([n.layer for n in one.layers]), strict=True))
    logged = [layer for layer in gated if labels[layer.name] in curves]
    if not logged:
        missing = "No gate curves: the adapter does not lie in its run's log folder." if gated else ""
        return tag("p", missing, class_="soft") if missing else ""
    ys = [y for layer in logged for curve in curves[labels[layer.name]] for _, y in curve]
    bounds = (min(ys), max(ys))
    parts: list[str] = []
    names = kind_names(by_kind(logged))
    for kind, of in by_kind(logged).items():
        charts = []
        for layer in of:
            series = [
                Series(_component(layer, j), thinned(curve, _POINTS), *_look(layer, j))
                for j, curve in enumerate(curves[labels[layer.name]])
                if j < len(layer.alpha)
            ]
            told = f"gates of {layer.name} over the steps"
            chart = line_chart(series, told, "step", bounds, size=(180, 120))
            charts.append(panel(labels[layer.name], chart))
        keys = legend([(_component(of[0], j), *_look(of[0], j)) for j in range(len(of[0].alpha))])
        body = keys + tag("div", "".join(charts), class_="small")
        opened = {} if parts else {"open": ""}
        parts.append(
            tag("details", tag("summary", text(f"{names[kind]} ({len(of)} layers)")) + body, **opened)
        )
    return tag("h2", "Gates over the run") + "".join(parts)


def _look(layer: Layer, j: int) -> tuple[str, bool]:
    """Colour and dashes of a component: those of one shape share the colour."""
    if not layer.shapes:
        return f"c{j % COLOURS}", j >= COLOURS
    shapes = list(dict.fromkeys(layer.shapes))
    if len(shapes) == 1:
        return f"c{j % COLOURS}", j >= COLOURS
    return f"c{shapes.index(layer.shapes[j]) % COLOURS}", layer.shapes.index(layer.shapes[j]) < j


def spectra(one: Inspection) -> str:
    """Singular values relative to the largest, a curve a layer."""
    panels = []
    kinds = by_kind(one.layers)
    names = kind_names(kinds)
    for kind, of in kinds.items():
        drawn = [n for n in of if n.spectrum is not None and n.spectrum.rank > 0]
        series = []
        for i, n in enumerate(drawn):
            assert n.spectrum is not None
            first = float(n.spectrum.sizes[0])
            points = [
                (float(i), size / first) for i, size in sampled(n.spectrum.sizes) if size > _FLOOR * first
            ]
            order = round(LEVELS * i / max(1, len(drawn) - 1))
            series.append(Series(n.name, points, f"t{order}"))
        if series:
            ends = [(f"layer {drawn[i].layer.number}", f"t{t}", False) for i, t in ((0, 0), (-1, LEVELS))]
            title = f"{names[kind]}: σ_i / σ_1"
            chart = line_chart(series, title, "i", (_FLOOR, 1.0), logarithmic=True, size=(340, 220))
            panels.append(panel(title, chart, legend(ends[: 1 + (len(drawn) > 1)])))
    return _section("Singular values", "".join(panels), "Both axes are logarithmic; a curve is a layer.")


def comparison(compared: Comparison, first: str, second: str) -> str:
    """Two adapters.

    Args:
        compared: What they have in common.
        first: Name of the first.
        second: Name of the second.
    """
    notes = "".join(tag("p", text(note), class_="soft") for note in compared.notes)
    if not compared.layers:
        return tag("h2", "Comparison") + notes
    values: dict[str, Callable[[LayerDifference], float | None]] = {
        "cosine of ΔW and ΔW' (1: one direction)": lambda d: d.cosine,
        "‖ΔW − ΔW'‖ / larger norm": lambda d: d.distance,
        "‖ΔW'‖ / ‖ΔW‖": lambda d: d.norms[1] / d.norms[0] if d.norms[0] else None,
        "gates: ½ Σ |α' − α|": lambda d: d.gate_distance,
    }
    panels = [
        _curves_by_layer(title, compared.layers, value, lambda d: d.number) for title, value in values.items()
    ]
    kinds = by_kind(compared.layers)
    names = kind_names(kinds)
    extent = max((abs(a) for d in compared.layers for a in d.gates), default=0.0)
    for kind, of in kinds.items():
        if extent and all(d.gates for d in of):
            rows = [(str(d.number) if d.number >= 0 else "", d.gates) for d in of]
            titles = [[f"{d.name}, component {j}: {a:+.4g}" for j, a in enumerate(d.gates)] for d in of]
            title = f"{names[kind]}: α' − α"
            drawing = heat_map(rows, titles, diverging(extent, 0.0), title)
            panels.append(panel(title, drawing, scale(f"−{extent:.3f}", "0", f"{extent:.3f}", DIVERGING)))
    intro = f"ΔW and α are those of {first}, ΔW' and α' those of {second}."
    return _section("Comparison", "".join(panels), intro, notes)


def _section(title: str, panels: str, intro: str = "", notes: str = "") -> str:
    """Panels below a heading; nothing where there are none."""
    if not panels:
        return notes
    told = tag("p", text(intro), class_="soft") if intro else ""
    return tag("h2", text(title)) + told + notes + tag("div", panels, class_="grid")
