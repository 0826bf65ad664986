"""Heat maps, curves and tables as HTML and SVG, without scripts.

Colours are classes of the page's style sheet, which knows light and dark. Every text is escaped here: names
come from directories of strangers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from html import escape
from typing import NamedTuple

from moka_pl.errors import printable

#: Steps of a colour scale, on each side of a diverging one; colours of series.
LEVELS, COLOURS = 10, 10

_WIDTH = 340  # of a panel, in the units of its drawing; about the pixels of a phone
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 16, 30


class Series(NamedTuple):
    """A curve.

    Attributes:
        label: Its name.
        points: Pairs (x, y), x ascending.
        colour: Its class: ``c0`` to ``c9`` tell series apart, ``t0`` to ``t10`` order them.
        dashed: Whether it is dashed.
    """

    label: str
    points: Sequence[tuple[float, float]]
    colour: str
    dashed: bool = False


def text(value: object) -> str:
    """A value as text of the page, whatever it holds."""
    return escape(printable(str(value)))


def number(value: float | None) -> str:
    """A number in four digits; a dash for None."""
    return "–" if value is None else f"{value:.4g}"


def tag(name: str, content: str, **attributes: object) -> str:
    """An element; ``class_`` is its class, and an underscore in other names a hyphen.

    Args:
        name: Its name.
        content: What is in it, already escaped.
        attributes: Its attributes, which are escaped here.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
    )
    return f"<{name}{written}>{content}</{name}>"


def table(columns: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A table that scrolls in itself where it is wider than the page.

    Args:
        columns: Titles, of which the first is that of the rows' names; without any there is no head.
        rows: Names and cells.
    """
    head = "".join(tag("th", text(column), scope="col") for column in columns)
    body = "".join(
        tag("tr", tag("th", text(name), scope="row") + "".join(tag("td", text(cell)) for cell in cells))
        for name, cells in rows
    )
    whole = tag("table", (tag("thead", tag("tr", head)) if columns else "") + tag("tbody", body))
    return tag("div", whole, class_="scroll", tabindex=0)


def panel(title: str, drawing: str, note: str = "") -> str:
    """A drawing with a title.

    Args:
        title: The title.
        drawing: The drawing, already escaped.
        note: What else is to be said of it, likewise.
    """
    return tag("figure", tag("figcaption", text(title)) + drawing + note)


def legend(entries: Sequence[tuple[str, str, bool]]) -> str:
    """Names with their colours: label, class, whether dashed."""
    keys = []
    for label, colour, dashed in entries:
        line = f'<path d="M0 4H20" class="{colour}{" dash" if dashed else ""}"/>'
        keys.append(tag("li", tag("svg", line, viewBox="0 0 20 8") + text(label)))
    return tag("ul", "".join(keys), class_="keys")


def heat_map(
    rows: Sequence[tuple[str, Sequence[float]]],
    titles: Sequence[Sequence[str]],
    colour: Callable[[float], str],
    label: str,
) -> str:
    """Draws a heat map, a row a layer, a column a component.

    Args:
        rows: Short name and values of every layer.
        titles: What is told of every cell under the pointer.
        colour: The class of a value.
        label: What is drawn, for readers of the screen.
    """
    columns = max(len(values) for _, values in rows)
    wide, high = (_WIDTH - _LEFT - _RIGHT) / columns, 12 if len(rows) <= 48 else 7
    every = 1 if high == 12 else 2
    parts = [
        f'<text x="{_LEFT + (j + 0.5) * wide:.1f}" y="11" class="mid">{j}</text>'
        for j in range(0, columns, math.ceil(columns / 16))
    ]
    for i, (name, values) in enumerate(rows):
        y = _TOP + i * high
        if i % every == 0:
            parts.append(f'<text x="{_LEFT - 4}" y="{y + high / 2 + 3:.1f}" class="end">{text(name)}</text>')
        parts += [
            f'<rect x="{_LEFT + j * wide:.1f}" y="{y}" width="{wide:.2f}" height="{high}" '
            f'class="{colour(value)}"><title>{text(titles[i][j])}</title></rect>'
            for j, value in enumerate(values)
        ]
    return _svg("".join(parts), (_WIDTH, _TOP + len(rows) * high + 4), label)


def scale(low: str, middle: str, high: str, classes: Sequence[str]) -> str:
    """The key of a colour scale.

    Args:
        low: What its first colour stands for.
        middle: What that in the middle stands for; may be empty.
        high: What its last colour stands for.
        classes: The classes of its colours.
    """
    wide = _WIDTH / len(classes)
    cells = "".join(
        f'<rect x="{i * wide:.1f}" y="0" width="{wide + 0.5:.1f}" height="8" class="{name}"/>'
        for i, name in enumerate(classes)
    )
    ends = ((0.0, low, ""), (_WIDTH / 2, middle, ' class="mid"'), (_WIDTH, high, ' class="end"'))
    marks = "".join(f'<text x="{x}" y="20"{look}>{text(name)}</text>' for x, name, look in ends if name)
    return _svg(cells + marks, (_WIDTH, 24), "colours")


def diverging(extent: float, centre: float) -> Callable[[float], str]:
    """Returns a colour scale around a centre, up to ``extent`` on both sides: classes ``n10`` … ``p10``."""

    def colour(value: float) -> str:
        level = round(LEVELS * min(1.0, abs(value - centre) / extent)) if extent else 0
        return f"{'n' if value < centre else 'p'}{level}"

    return colour


#: Classes of a diverging scale and of one from 0, in their order.
DIVERGING = [*(f"n{i}" for i in range(LEVELS, 0, -1)), *(f"p{i}" for i in range(LEVELS + 1))]
SEQUENTIAL = [f"s{i}" for i in range(LEVELS + 1)]


def sequential(largest: float) -> Callable[[float], str]:
    """Returns a colour scale from 0 to ``largest``: classes ``s0`` … ``s10``."""
    return lambda value: f"s{round(LEVELS * value / largest) if largest else 0}"


def line_chart(
    series: Sequence[Series],
    label: str,
    x_label: str,
    bounds: tuple[float, float] | None = None,
    logarithmic: bool = False,
    size: tuple[int, int] = (_WIDTH, 190),
) -> str:
    """Draws curves over one axis.

    Args:
        series: The curves.
        label: What is drawn, for readers of the screen.
        x_label: What x is.
        bounds: Ends of the y axis; default: those of the values, with 0.
        logarithmic: Whether both axes are; all x, and the lower bound, must be positive.
        size: Width and height of the drawing.
    """
    right, bottom = size[0] - _RIGHT, size[1] - _BOTTOM
    xs = [x for one in series for x, _ in one.points]
    ys = [y for one in series for _, y in one.points]
    (left, last), (low, high) = (min(xs), max(xs)), bounds or (min(0.0, *ys), max(0.0, *ys))
    bend = math.log10 if logarithmic else float
    across, up = _axis(bend(left), bend(last), _LEFT, right), _axis(bend(low), bend(high), bottom, _TOP)
    parts = []
    marks = _powers(low, high) if logarithmic else ticks(low, high)
    for y, name in zip(marks, _tick_names(marks, logarithmic), strict=True):
        at = up(bend(y))
        parts.append(f'<path d="M{_LEFT} {at:.1f}H{right}" class="rule"/>')
        parts.append(f'<text x="{_LEFT - 4}" y="{at + 3:.1f}" class="end">{name}</text>')
    parts += [
        f'<text x="{across(bend(x)):.1f}" y="{bottom + 14}" class="mid">{x:.4g}</text>'
        for x in (_powers(left, last) if logarithmic else ticks(left, last, whole=True))
    ]
    parts.append(f'<text x="{(_LEFT + right) / 2}" y="{size[1] - 3}" class="mid">{text(x_label)}</text>')
    for one in series:
        path = " ".join(f"{across(bend(x)):.1f},{up(bend(max(y, low))):.1f}" for x, y in one.points)
        look, title = f"{one.colour}{' dash' if one.dashed else ''}", tag("title", text(one.label))
        parts.append(f'<polyline points="{path}" class="{look}">{title}</polyline>')
    return _svg("".join(parts), size, label)


def ticks(low: float, high: float, whole: bool = False) -> list[float]:
    """About four round numbers from ``low`` to ``high``.

    Args:
        low: The lower end.
        high: The upper end.
        whole: Whether only whole numbers will do.
    """
    if _is_flat(low, high):
        return [low]
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step = next(step * k for k in (1, 2, 5, 10) if (high - low) / (step * k) <= 5)
    step = max(1.0, step) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _is_flat(low: float, high: float) -> bool:
    """Whether values differ by their rounding alone, so that no marks would tell them apart."""
    return high - low <= max(1e-9 * max(abs(low), abs(high)), 1e-300)


def _tick_names(marks: Sequence[float], logarithmic: bool) -> list[str]:
    """Numbers with as many decimals as tell them apart."""
    if logarithmic or len(marks) < 2:
        return [f"{mark:.4g}" for mark in marks]
    decimals = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    return [f"{mark:.{decimals}f}" for mark in marks]


def _powers(low: float, high: float) -> list[float]:
    return [
        10.0**i for i in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)
    ]


def _axis(low: float, high: float, start: float, end: float) -> Callable[[float], float]:
    """Maps ``low`` … ``high`` to ``start`` … ``end``; values that are all the same to the middle."""
    if _is_flat(low, high):
        return lambda _: (start + end) / 2
    return lambda value: start + (value - low) / (high - low) * (end - start)


def _svg(content: str, size: tuple[int, int], label: str) -> str:
    return tag("svg", content, viewBox=f"0 0 {size[0]} {size[1]}", role="img", aria_label=label)


def thinned(points: Sequence[tuple[int, float]], most: int) -> list[tuple[float, float]]:
    """At most so many points of a curve, evenly, with its first and last."""
    if len(points) <= most:
        return [(float(x), y) for x, y in points]
    chosen = [round(i * (len(points) - 1) / (most - 1)) for i in range(most)]
    return [(float(points[i][0]), points[i][1]) for i in chosen]
