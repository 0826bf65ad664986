"""The page: whole in itself, of strangers' texts only as text, and as wide as the screen."""

import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from shared.chromium import BROWSER, chromium
from torch.utils.tensorboard import SummaryWriter

from moka_pl.adapters.metric_table import metric_table
from moka_pl.errors import ConfigError
from moka_pl.inspection.charts import Series, diverging, line_chart, sequential, ticks
from moka_pl.inspection.comparison import compare
from moka_pl.inspection.history import find_log, read_gate_curves, read_scalars
from moka_pl.inspection.page import check_target, page, write_page
from moka_pl.inspection.report import inspect_adapter

#: Elements that load, run or send something, and attributes that name an address or run a script.
FORBIDDEN = {"script", "link", "img", "iframe", "object", "embed", "form", "base", "use", "image", "a"}
VOID = {"meta", "wbr", "br"}


class Checker(HTMLParser):
    """Checks that every element is closed in its turn, and refuses what reaches beyond the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in FORBIDDEN, tag
        for name, value in attrs:
            assert name not in ("src", "href", "xlink:href", "srcset", "action", "style"), name
            assert not name.startswith("on"), name
            assert "//" not in (value or "") or name == "aria-label", (name, value)
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def checked(contents: str) -> Checker:
    checker = Checker()
    checker.feed(contents)
    checker.close()
    assert checker.open == []
    (style,) = re.findall(r"<style>(.*?)</style>", contents, re.DOTALL)
    assert not re.search(r"url\(|@import|https?:|//", style)
    for width in re.findall(r"(?<!max-)(?<!stroke-)width:(\d+)px", style):
        assert int(width) <= 340
    # A column of a grid that is at least so wide must not be wider than the screen.
    assert all(low.startswith("min(") for low in re.findall(r"minmax\(([^,]+)", style))
    assert "prefers-color-scheme:dark" in style
    classes = {name for of in re.findall(r'class="([^"]*)"', contents) for name in of.split()}
    assert all(f".{name}" in style for name in classes), classes
    return checker


def log(run: Path, tag: str, layers: int = 2) -> None:
    """Writes gate curves of ten steps of some layers."""
    with SummaryWriter(str(run)) as writer:
        for step in range(10):
            for n in range(layers):
                for i in range(3):
                    writer.add_scalar(tag.format(n=n, i=i), 1 / 3 + 0.01 * step * (i - 1), step)
        writer.add_scalar("train/loss", 1.0, 0)


OLD, NEW = "gate/layer{n:02d}.q_proj/alpha_{i}", "α q_proj/layer{n:02d}/{i}: 4×4 ⊗ 8×8"


@pytest.mark.parametrize("tag", [OLD, NEW])
def test_curves_are_read_from_the_log_beside_the_adapter(make_adapter: Callable, tag: str) -> None:
    path, _ = make_adapter()
    assert find_log(path) is None
    run = path.parent.parent
    log(run, tag)
    assert find_log(path) == run
    curves = read_gate_curves(run)
    assert curves.layers == ["layer00.q_proj", "layer01.q_proj"]
    assert curves.alpha.shape == (10, 2, 3)
    assert curves.steps == list(range(10))
    assert curves.alpha[:, 1, 2].tolist() == pytest.approx([1 / 3 + 0.01 * step for step in range(10)])


@pytest.mark.parametrize(("second", "found"), [([2, 0, 1], True), ([0], False)])
def test_gates_are_told_apart_by_their_numbers(second: list[int], found: bool, tmp_path: Path) -> None:
    with SummaryWriter(str(tmp_path)) as writer:
        for n, numbers in enumerate(([0, 1, 2], second)):
            for i in numbers:
                writer.add_scalar(NEW.format(n=n, i=i), n + i, 5)
    curves = read_gate_curves(tmp_path)
    assert (curves is not None) is found
    if curves is not None:
        assert curves.by_layer()["layer01.q_proj"] == [[(5, 1.0)], [(5, 2.0)], [(5, 3.0)]]


def test_a_damaged_log_gives_no_curves(make_adapter: Callable) -> None:
    path, _ = make_adapter()
    (path / "events.out.tfevents.1").write_bytes(bytes(range(256)) * 9)
    assert find_log(path) == path
    assert read_gate_curves(path) is None
    checked(page([inspect_adapter(path)]))


@pytest.fixture
def two(make_adapter: Callable) -> tuple[Path, Path]:
    """Two adapters, the first with its run's log."""
    first, second = make_adapter("one", 1)[0], make_adapter("two", 2)[0]
    log(first.parent.parent, NEW)
    return first, second


def test_a_page_shows_everything_and_needs_nothing(two: tuple[Path, Path]) -> None:
    found = [inspect_adapter(path) for path in two]
    checker = checked(page(found, compare(*found)))
    told = "\n".join(checker.texts)
    for heading in ("Comparison", "Metrics at step 7", "Components", "Gates over the run", "Singular values"):
        assert heading in told
    assert "50.0% ± 10.0" in told
    assert "one/adapters/best" in told
    for layer in found[0].layers:
        assert layer.name in told
        for i, alpha in enumerate(layer.layer.alpha.tolist()):
            assert f"{layer.name}, component {i} ({layer.layer.shapes[i]}): {alpha:.4g}" in told


@pytest.mark.parametrize(
    "options",
    [
        {"filters": "prime"},
        {"components": 1, "gating": "none"},
        {"gating": "sigmoid", "filters": "servable", "rank": 4, "target_modules": "all-linear"},
    ],
    ids=["no sizes", "one component", "sigmoid"],
)
def test_pages_of_other_adapters_are_whole(make_adapter: Callable, options: dict) -> None:
    checked(page([inspect_adapter(make_adapter(**options)[0])]))


def test_an_untrained_adapter_has_a_page(make_adapter: Callable) -> None:
    found = inspect_adapter(make_adapter()[0])
    for n in found.layers:
        assert n.layer.update is not None
        n.layer.update.right.zero_()
    (again,) = [inspect_adapter(found.path)]
    checked(page([again, again], compare(again, again)))


EVIL = '"><script>alert(1)</script><img src=//evil.example/x onerror=alert(1)>\x1b[2J'


def test_texts_of_strangers_stay_texts(make_adapter: Callable) -> None:
    path, _ = make_adapter(base=EVIL)
    found = inspect_adapter(path)
    found.info.extra["metrics"] = {EVIL: 1.0}
    found.left_out.append(EVIL)
    contents = page([found])
    checker = checked(contents)
    assert "script" not in checker.tags
    assert "\x1b" not in contents
    assert any("<script>alert(1)</script>" in text for text in checker.texts)
    assert "default-src 'none'" in contents


def test_a_page_is_written_whole_or_not_at_all(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, file = [inspect_adapter(two[0])], tmp_path / "page.html"
    write_page(file, found, None)
    written = file.read_text(encoding="utf-8")
    assert written == page(found)
    monkeypatch.setattr(Path, "replace", lambda self, target: (_ for _ in ()).throw(OSError(28, "disk full")))
    with pytest.raises(ConfigError, match=r"page.html: disk full"):
        write_page(file, found, None)
    assert file.read_text(encoding="utf-8") == written
    assert not list(tmp_path.glob(".*"))


def test_a_page_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a folder"):
        check_target(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=f"cannot write there .{tmp_path}/file is a file."):
        check_target(tmp_path / "file" / "page.html")


def test_only_an_older_page_is_replaced(tmp_path: Path) -> None:
    older, other = tmp_path / "page.html", tmp_path / "adapter_config.json"
    older.write_text("<!DOCTYPE html>\n<html>")
    other.write_text("{}")
    check_target(older)
    with pytest.raises(ConfigError, match="is there already, and is no page of HTML; choose another file"):
        check_target(other)


def test_ticks_are_round_and_lie_within() -> None:
    assert ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(0, 29, whole=True) == [0, 10, 20]
    assert ticks(0.0953, 0.1052) == pytest.approx([0.096, 0.098, 0.1, 0.102, 0.104])
    assert ticks(3, 3) == [3]
    assert ticks(0, 1, whole=True) == [0, 1]


NUMBERS = st.floats(-1e300, 1e300)


@given(NUMBERS, NUMBERS | st.none(), st.integers(0, 4), st.booleans())
@example(low=0.9999999999999998, other=None, apart=1, whole=False)  # likenesses, but for their rounding
@example(low=0.0, other=5e-324, apart=0, whole=False)
def test_charts_of_any_values_are_drawn(low: float, other: float | None, apart: int, whole: bool) -> None:
    high = other if other is not None else low
    for _ in range(apart):
        high = math.nextafter(high, math.inf)
    low, high = min(low, high), max(low, high)
    marks = ticks(low, high, whole)
    assert marks == sorted(set(marks))
    assert len(marks) <= 6
    drawn = line_chart([Series("a", [(0, low), (1, high)], "c0")], "values", "step", (low, high))
    assert "nan" not in drawn
    assert "inf" not in drawn


def test_colours_tell_sides_and_sizes() -> None:
    colour = diverging(0.1, 0.5)
    assert [colour(x) for x in (0.3, 0.4, 0.5, 0.55, 0.6)] == ["n10", "n10", "p0", "p5", "p10"]
    assert [sequential(2.0)(x) for x in (0, 1, 2)] == ["s0", "s5", "s10"]
    assert (diverging(0, 1)(1), sequential(0)(0)) == ("p0", "s0")


def test_metrics_are_a_row_a_task() -> None:
    found = metric_table(
        {
            "val/accuracy/easy": 0.5,
            "val/accuracy/easy_stderr": 0.05,
            "val/nll/easy": 2.0,
            "val/sums/loss": 1.5,
            "val/loss": 1.0,
            "val/strange": 3.0,
        }
    )
    assert (found.title, found.columns) == ("val", ["loss", "accuracy", "nll", "value"])
    assert found.rows == [
        ("mean", ["1.0000", "", "", ""]),
        ("easy", ["", "50.0% ± 5.0", "2.0000", ""]),
        ("sums", ["1.5000", "", "", ""]),
        ("strange", ["", "", "", "3.0000"]),
    ]


#: Elements that stick out of the page, but for what scrolls in itself.
OUTSIDE = """[...document.querySelectorAll('body *')].filter(e => !e.closest('.scroll, svg')
    && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 80))"""
#: Texts of drawings that stick out of them, or are too small to be read.
CUT = """[...document.querySelectorAll('svg text')].filter(e => {
    const t = e.getBoundingClientRect(), s = e.ownerSVGElement.getBoundingClientRect();
    return t.left < s.left - 1 || t.right > s.right + 1 || t.height < 7}).map(e => e.outerHTML)"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here; the tests above check the page without one")
def test_in_a_browser_nothing_overflows_and_no_request_leaves(two: tuple[Path, Path], tmp_path: Path) -> None:
    torch.manual_seed(0)
    found = [inspect_adapter(path) for path in two]
    found[0].info.extra["metrics"] |= {
        f"val/{kind}/{'long' * 9}": 0.5 for kind in ("nll", "acc_norm", "generated")
    }
    file = tmp_path / "page.html"
    write_page(file, found, compare(*found))
    pictures = {}
    with chromium(tmp_path / "profile") as browser:
        for width in (1280, 390):
            for dark in (False, True):
                browser.show(file, width, dark)
                browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert browser.evaluate("document.documentElement.scrollWidth") <= width
                assert browser.evaluate(OUTSIDE) == []
                assert browser.evaluate(CUT) == []
                pictures[width, dark] = browser.picture()
                background = browser.evaluate("getComputedStyle(document.body).backgroundColor")
                assert background == ("rgb(21, 23, 27)" if dark else "rgb(255, 255, 255)")
        assert set(browser.requests) == {file.as_uri()}
    assert len(set(pictures.values())) == 4
    assert all(picture.startswith(b"\x89PNG") for picture in pictures.values())


def test_scalars_of_a_run(tmp_path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            writer.add_scalar("train/loss", step / 2, step)
    assert list(read_scalars(tmp_path)) == [(step, "train/loss", step / 2) for step in range(3)]
