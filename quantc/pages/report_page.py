"""The report of a run as one HTML page: no external resources, light and dark, a table that sorts.

Everything that comes from the report is escaped; the page's policy forbids loading anything from anywhere.
"""

from __future__ import annotations

import re
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from ..spec import QuantSpec
from ..units import duration, number, plural, ratio, rewritten, size, to_printable

# Geometry of a chart panel, in SVG units.
PANEL_WIDTH, PANEL_HEIGHT = 220, 64
COLUMNS = ("linear", "spec", "shape", "bits/weight", "error", "method", "rows", "fallbacks")
NUMERIC = {"shape", "bits/weight", "error", "rows", "fallbacks"}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --dim: #656b73; --paper: #fff; --line: #d9dde2;
  --bar: #2f6fb3; --worst: #c2410c; --shade: #f5f6f8; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --dim: #9aa1aa; --paper: #15171a;
  --line: #33383e; --bar: #6aa5e3; --worst: #f08a4b; --shade: #1d2024; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 0 auto;
  max-width: 1100px; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .6rem; }
p { margin: .3rem 0; } .dim { color: var(--dim); }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: .8rem;
  margin: 1.4rem 0 0; }
dl div { background: var(--shade); border-radius: 6px; padding: .6rem .8rem; }
dt { color: var(--dim); font-size: .82rem; }
dd { margin: 0; font-size: 1.2rem; font-variant-numeric: tabular-nums; }
dd small { display: block; color: var(--dim); font-size: .8rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 1rem 1.2rem; }
figure { margin: 0; }
figcaption { font-size: .82rem; display: flex; justify-content: space-between; gap: .5rem;
  margin-bottom: .25rem; }
svg { width: 100%; height: auto; border-bottom: 1px solid var(--line); display: block; }
rect { fill: var(--bar); } rect.worst { fill: var(--worst); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .3rem 1.1rem .3rem 0; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.n { text-align: right; }
th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--bar); outline-offset: 2px; }
th[aria-sort=ascending] button::after { content: " ▲"; }
th[aria-sort=descending] button::after { content: " ▼"; }
tbody tr:hover { background: var(--shade); }
"""

SCRIPT = """
for (const th of document.querySelectorAll("th")) th.firstChild.addEventListener("click", () => {
  const up = th.getAttribute("aria-sort") !== "ascending", i = th.cellIndex;
  const body = document.querySelector("tbody");
  for (const other of th.parentNode.children) other.removeAttribute("aria-sort");
  th.setAttribute("aria-sort", up ? "ascending" : "descending");
  const key = row => row.cells[i].dataset.v ?? row.cells[i].textContent;
  const order = new Intl.Collator("en", { numeric: true });
  const compare = th.className === "n" ? (a, b) => key(a) - key(b) : (a, b) => order.compare(key(a), key(b));
  body.append(...[...body.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)));
});
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="generator" content="quantc">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
{body}
<script>{script}</script>
</body>
</html>
"""


def is_page(file: Path) -> bool:
    """Return whether a file is a page that quantc wrote."""
    with file.open("rb") as stream:
        return b'<meta name="generator" content="quantc">' in stream.read(1000)


def render(report: dict[str, Any]) -> str:
    """Return one self-contained page from a report as `quantc.report.read_report` returns it."""
    report = to_printable(report)
    sections = [
        _header(report),
        _chart(report["linears"]),
        _section("Rewritten", [escape(line) for line in rewritten(report["rewrites"])]),
        _section("Not rewritten", _with_reasons(report["refused"])),
        _section("Kept as they are", _with_reasons(report["kept"])),
        _section("Notes", [escape(note) for note in report["notes"]]),
    ]
    body = "\n".join(section for section in [*sections, _table(report["linears"])] if section)
    title = f"{escape(report['output'])} · quantc report"
    return PAGE.format(title=title, style=STYLE, body=body, script=SCRIPT)


def _header(report: dict[str, Any]) -> str:
    fallbacks = report["expert_fallbacks"]
    cells = [
        ("bits per weight", number(report["bits_per_weight"], 4), "all that is stored for the linears"),
        ("weights", size(report["weights_bytes"]), _against_source(report)),
        ("linears", f"{len(report['linears']):,}", plural(fallbacks, "expert fallback") if fallbacks else ""),
        ("time", duration(report["wall_seconds"]), f"{duration(report['cpu_seconds'])} of CPU time"),
        ("peak memory", size(report["peak_rss_bytes"]), ""),
    ]
    facts = "\n".join(
        f"<div><dt>{name}</dt><dd>{figure}<small>{detail}</small></dd></div>" for name, figure, detail in cells
    )
    calibration = f", calibration {escape(report['calibration'])}" if report["calibration"] else ""
    return (
        f"<h1>{escape(report['output'])}</h1>\n"
        f'<p class="dim">Quantized from {escape(report["model"])}{calibration}</p>\n<dl>\n{facts}\n</dl>'
    )


def _against_source(report: dict[str, Any]) -> str:
    source = report["source_bytes"]
    return f"{ratio(report['weights_bytes'], source)} of the source's {size(source)}" if source else ""


def _chart(linears: list[dict[str, Any]]) -> str:
    """Return a panel of bars per kind of linear, one bar a block; all panels share the scale, so they compare."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for linear in linears:
        kinds.setdefault(_kind(linear["name"]), []).append(linear)
    top = max((_height_of(linear["error"]) for linear in linears), default=0.0)
    if not top:
        return ""
    panels = "\n".join(_panel(kind, members, top) for kind, members in kinds.items())
    return (
        "<h2>Error by block</h2>\n"
        '<p class="dim">Share of the output\'s energy that rounding changed, first block to last; '
        f"the worst of each kind is highlighted. All panels share one scale, up to {number(top)}.</p>\n"
        f'<div class="panels">\n{panels}\n</div>'
    )


def _panel(kind: str, members: list[dict[str, Any]], top: float) -> str:
    step = PANEL_WIDTH / len(members)
    worst = max(_height_of(linear["error"]) for linear in members)
    bars = "".join(_bar(linear, place * step, step, worst, top) for place, linear in enumerate(members))
    name, box = escape(kind), f"0 0 {PANEL_WIDTH} {PANEL_HEIGHT}"
    return (
        f'<figure><figcaption><span>{name}</span><span class="dim">worst {number(worst)}</span></figcaption>'
        f'<svg viewBox="{box}" role="img" aria-label="{name}">{bars}</svg></figure>'
    )


def _bar(linear: dict[str, Any], x: float, step: float, worst: float, top: float) -> str:
    value = _height_of(linear["error"])
    height = max(0.75, PANEL_HEIGHT * value / top)
    mark = ' class="worst"' if value == worst else ""
    return (
        f'<rect{mark} x="{x:.2f}" y="{PANEL_HEIGHT - height:.2f}" width="{min(0.8 * step, 24):.2f}" '
        f'height="{height:.2f}"><title>{escape(linear["name"])}: {number(linear["error"])}</title></rect>'
    )


def _height_of(error: float | None) -> float:
    return error if error is not None and isfinite(error) else 0.0


def _kind(name: str) -> str:
    """Return what linears of different blocks have in common: the name after the block's number."""
    found = re.search(r"\.\d+\.(.+)", name)
    return found.group(1) if found else name


def _with_reasons(reasons: dict[str, str]) -> list[str]:
    return [f'{escape(name)} <span class="dim">{escape(reason)}</span>' for name, reason in reasons.items()]


def _section(title: str, items: list[str]) -> str:
    return f"<h2>{title}</h2>\n" + "\n".join(f"<p>{item}</p>" for item in items) if items else ""


def _table(linears: list[dict[str, Any]]) -> str:
    heads = "".join(f'<th scope="col"{_numeric(name)}><button>{name}</button></th>' for name in COLUMNS)
    rows = "\n".join(_row(linear) for linear in linears)
    return (
        f'<h2>Linears</h2>\n<div class="scroll"><table>\n<thead><tr>{heads}</tr></thead>\n'
        f"<tbody>\n{rows}\n</tbody>\n</table></div>"
    )


def _row(linear: dict[str, Any]) -> str:
    n, k = linear["shape"]
    experts = linear["experts"]
    shown = f"{experts} x {n} x {k}" if experts else f"{n} x {k}"
    error = linear["error"]
    cells = [
        (linear["name"], None),
        (QuantSpec.from_dict(linear["spec"]).label(), None),
        (shown, n * k * max(1, experts)),
        (number(linear["bits_per_weight"], 4), linear["bits_per_weight"]),
        (number(error), error if error is not None and isfinite(error) else 1e300),
        (linear["method"], None),
        (f"{linear['rows']:,}", linear["rows"]),
        (str(linear["fallbacks"]), linear["fallbacks"]),
    ]
    return "<tr>" + "".join(_cell(name, *cell) for name, cell in zip(COLUMNS, cells, strict=True)) + "</tr>"


def _cell(column: str, text: str, value: float | None) -> str:
    key = "" if value is None else f' data-v="{value!r}"'
    return f"<td{_numeric(column)}{key}>{escape(text)}</td>"


def _numeric(column: str) -> str:
    return ' class="n"' if column in NUMERIC else ""
