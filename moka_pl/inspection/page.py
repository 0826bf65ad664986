"""One self-contained page about an adapter, or two: no scripts, no fonts, nothing from elsewhere."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from string import Template

from moka_pl.adapters.metric_table import metric_table
from moka_pl.errors import ConfigError
from moka_pl.inspection import sections
from moka_pl.inspection.charts import number, table, tag, text
from moka_pl.inspection.comparison import Comparison
from moka_pl.inspection.report import Inspection
from moka_pl.inspection.style import style_sheet
from moka_pl.inspection.text import facts_of
from moka_pl.utils import replaced_file, unwritable_reason, write_failure
from moka_pl.version import __version__

_BEGIN = b"<!doctype html>"
# Nothing may be loaded from anywhere, whatever a directory's texts hold.
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>$style</style>
</head>
<body>
<h1>$heading</h1>
$body
<p class="soft">Written by moka_pl $version.</p>
</body>
</html>
""")


def check_target(file: Path) -> None:
    """Refuses a page that cannot be written, before any work.

    Raises:
        ConfigError: If it is a folder, or its folder cannot be written to.
    """
    if file.is_dir():
        raise ConfigError(f"--html {file} is a folder; name a file in it, such as {file / 'adapter.html'}")
    if file.exists() and not _is_page(file):
        raise ConfigError(f"--html {file} is there already, and is no page of HTML; choose another file")
    if (reason := unwritable_reason(file.resolve().parent)) is not None:
        raise ConfigError(f"--html {file}: cannot write there ({reason}); choose another folder")


def _is_page(file: Path) -> bool:
    """Whether a file is an older page, or empty."""
    try:
        with file.open("rb") as contents:
            return contents.read(len(_BEGIN)).lower() in (b"", _BEGIN)
    except OSError:
        return False


def write_page(file: Path, found: Sequence[Inspection], compared: Comparison | None) -> None:
    """Writes the page; an older one is replaced once the new one is whole.

    Args:
        file: Where to.
        found: One adapter, or two.
        compared: What the two have in common.

    Raises:
        ConfigError: If it cannot be written.
    """
    contents = page(found, compared).encode()
    file = Path(os.path.realpath(file))
    try:
        with replaced_file(file) as stream:
            stream.write(contents)
    except OSError as error:
        reason = write_failure(error, file.parent, len(contents))
        raise ConfigError(f"--html {file}: {reason}; choose another folder") from error


def page(found: Sequence[Inspection], compared: Comparison | None = None) -> str:
    """Returns the page as HTML.

    Args:
        found: One adapter, or two.
        compared: What the two have in common.
    """
    names = _names(found)
    title = text("Adapter " + " and ".join(names))
    parts = [_facts(found, names)]
    if compared is not None:
        parts.append(sections.comparison(compared, *names))
    for one, name in zip(found, names, strict=True):
        if len(found) > 1:
            parts.append(tag("h1", text(name), class_="which"))
        parts += [_metrics(one), *(section(one) for section in _SECTIONS)]
    return _PAGE.substitute(
        title=title,
        heading=title.replace("/", "/<wbr>"),
        style=style_sheet(),
        body="\n".join(parts),
        version=text(__version__),
    )


def _names(found: Sequence[Inspection]) -> list[str]:
    """The ends of adapters' paths, long enough to differ: ``smollm2/version_0/adapters/best``."""
    parts = [one.path.resolve().parts for one in found]
    length = next((k for k in range(4, 100) if len({of[-k:] for of in parts}) == len(parts)), 4)
    return ["/".join(of[-length:]).lstrip("/") for of in parts]


def _facts(found: Sequence[Inspection], titles: Sequence[str]) -> str:
    facts = [facts_of(one) for one in found]
    names = list(dict.fromkeys(name for of in facts for name in of))
    rows = [(name, [of.get(name, "–") for of in facts]) for name in names]
    columns = ["", *titles] if len(found) > 1 else []
    return tag("div", table(columns, rows), class_="facts")


def _metrics(one: Inspection) -> str:
    if not (metrics := one.info.extra.get("metrics")):
        return ""
    found = metric_table(metrics)
    step = "" if one.metrics_step is None else f" at step {one.metrics_step}"
    return tag("h2", text(f"Metrics{step}")) + table([found.title, *found.columns], found.rows)


def _layer_table(one: Inspection) -> str:
    """Every number of every layer, folded away."""
    if not one.layers:
        return ""
    columns = [
        "layer",
        "size",
        "‖ΔW‖",
        "‖ΔW‖/‖W‖",
        "stable rank",
        "entropy rank",
        "LoRA rank",
        "gate entropy",
    ]
    rows = []
    for n in one.layers:
        update, spectrum = n.layer.update, n.spectrum
        numbers: list[float | None] = [
            n.norm,
            n.relative_norm,
            n.stable_rank,
            None if spectrum is None else spectrum.entropy_rank,
            n.exact_lora_rank,
            n.layer.entropy,
        ]
        size = "–" if update is None else f"{update.m} × {update.n}"
        rows.append((n.name, [size, *map(number, numbers)]))
    return tag("details", tag("summary", "All layers in numbers") + table(columns, rows))


def _left_out(one: Inspection) -> str:
    if not one.left_out:
        return ""
    return tag("h2", "Left out") + tag("ul", "".join(tag("li", text(line)) for line in one.left_out))


_SECTIONS: tuple[Callable[[Inspection], str], ...] = (
    sections.by_layer,
    sections.heat_maps,
    sections.gate_curves,
    sections.spectra,
    _layer_table,
    _left_out,
)
