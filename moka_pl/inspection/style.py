"""The page's style sheet: light and dark, from a phone's width on."""

from moka_pl.inspection.charts import COLOURS, LEVELS

_SHEET = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1d21;--soft:#59616d;--line:#d8dce2;--card:#f6f7f9;
--centre:#efeff1;--less:#1f6fb4;--more:#c2501f;--none:#f1f3f6;--full:#0b4f6c;--first:#9cc4dd;--last:#0b2f55;
--light:.56}
@media (prefers-color-scheme:dark){:root{
--bg:#15171b;--fg:#e4e6ea;--soft:#a0a8b4;--line:#353a43;--card:#1d2026;
--centre:#2b2e35;--less:#58aef0;--more:#f0864f;--none:#23272e;--full:#7fd0f0;--first:#33607c;--last:#c8e6ff;
--light:.74}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:16px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.5rem;line-height:1.25;margin:.4em 0}h2{font-size:1.25rem;margin:1.6em 0 .5em}
.which{margin-top:2em;padding-top:.6em;border-top:2px solid var(--line)}
p,li{max-width:75ch}.soft,figcaption small{color:var(--soft)}
.grid,.small{display:grid;align-items:start}
.grid{gap:14px;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr))}
.small{gap:8px;grid-template-columns:repeat(auto-fill,minmax(min(46%,180px),1fr))}
figure{margin:0;padding:10px;min-width:0;background:var(--card);border:1px solid var(--line);
border-radius:8px}
.small figure{padding:4px}.small figcaption{font-size:.75rem}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:4px}
svg{display:block;width:100%;height:auto}
svg text{font-size:10px;fill:var(--soft)}
.mid{text-anchor:middle}.end{text-anchor:end}
path,polyline{fill:none;stroke-width:1.4;stroke-linejoin:round}
.rule{stroke:var(--line);stroke-width:1}
polyline[class^=t]{stroke-width:.9}.dash{stroke-dasharray:5 3}
rect{stroke:var(--card);stroke-width:.5}
.keys{list-style:none;margin:6px 0 0;padding:0;display:flex;flex-wrap:wrap;gap:2px 14px;font-size:.8rem}
.keys svg{display:inline-block;width:20px;height:8px;margin-right:5px;vertical-align:middle}
.keys path{stroke-width:3}
.scroll{overflow-x:auto;max-width:100%;border:1px solid var(--line);border-radius:8px}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--less)}
table{border-collapse:collapse;font-size:.85rem;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:4px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th:first-child{text-align:left}thead th{background:var(--card)}tbody th{font-weight:500}
tbody tr:last-child>*{border-bottom:0}
.facts th,.facts td{text-align:left}.facts td{white-space:normal}.facts th{white-space:normal}
details{margin:.8em 0}summary{cursor:pointer;font-weight:600}details>*+*{margin-top:8px}
"""


def style_sheet() -> str:
    """Returns the style sheet, with the classes of all colours."""
    rules = [_SHEET]
    for level in range(LEVELS + 1):
        share = round(100 * level / LEVELS)
        for name, colour, other in (
            ("n", "less", "centre"),
            ("p", "more", "centre"),
            ("s", "full", "none"),
        ):
            rules.append(f".{name}{level}{{fill:{_mix(colour, share, other)}}}")
        rules.append(f".t{level}{{stroke:{_mix('last', share, 'first')}}}")
    for i in range(COLOURS):
        hue = round(25 + 360 * (3 * i % COLOURS) / COLOURS)  # neighbours in the list are far apart
        rules.append(f".c{i}{{stroke:oklch(var(--light) .15 {hue})}}")
    return "\n".join(rules)


def _mix(colour: str, share: int, other: str) -> str:
    return f"color-mix(in oklab,var(--{colour}) {share}%,var(--{other}))"
