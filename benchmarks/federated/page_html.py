"""The scoreboard's one HTML page: it needs no other file and no network."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.federated.figures import Figure, legend_html, to_svgs
from benchmarks.federated.panels import PALETTE, Look
from benchmarks.federated.read_runs import Run
from benchmarks.federated.tables import Table, to_html

_CSS = """
:root { color-scheme: light dark; --bg: #fff; --ink: #1f2933; --muted: #616e7c; --faint: #b8c2cc; --line: #e4e7eb;
        --tint: #edf4ff; --good: #2b8a3e; --bad: #c92a2a; PALETTE }
@media (prefers-color-scheme: dark) { :root { --bg: #12171d; --ink: #e4e9ee; --muted: #9aa7b4; --faint: #55616d;
        --line: #2a333c; --tint: #17263c; --good: #69db7c; --bad: #ff8787; DARK } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: var(--ink); background: var(--bg);
       max-width: 1240px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h3 { font-size: 1rem; margin: 1.8rem 0 .2rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; padding-top: .6rem; border-top: 2px solid var(--line); }
h4 { font-size: .95rem; margin: 1.6rem 0 .1rem; }
.sub, .caption { color: var(--muted); } .caption { font-size: .85rem; margin: .1rem 0 .4rem; max-width: 60rem; }
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 1rem 0; } a { color: var(--m0); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem;
       min-width: 24rem; }
th { text-align: left; color: var(--muted); font-weight: 600; vertical-align: bottom; min-width: 3.4rem;
     max-width: 9rem; cursor: pointer; }
th, td { padding: .3rem .8rem .3rem 0; } tr { border-bottom: 1px solid var(--line); }
td { white-space: nowrap; } td.words { white-space: normal; }
.n { text-align: right; } .best, .ours { font-weight: 700; } td.ours { color: var(--m0); }
.good { color: var(--good); } .bad { color: var(--bad); } [title] { text-decoration-line: none; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: .75rem; }
.panels svg { width: 100%; height: auto; font-family: system-ui, -apple-system, "Segoe UI", sans-serif; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; margin: .2rem 0 .6rem; }
.legend span { white-space: nowrap; } .legend svg { margin-right: .35rem; } .legend path { fill: none; }
details { margin: 1.2rem 0; } summary { cursor: pointer; color: var(--muted); }
footer { margin-top: 3rem; border-top: 2px solid var(--line); padding-top: .6rem; color: var(--muted);
         font-size: .85rem; } code { font-size: .95em; overflow-wrap: anywhere; }
"""
_DARK = {
    0: "#5c9dff",
    1: "#ff9f43",
    3: "#ff7aa8",
    4: "#b794f6",
    5: "#3bc9db",
    6: "#e0b528",
    7: "#ff8f8f",
    9: "#d99a6c",
}
"""Lighter versions of the palette's colours that are too dark on a dark page."""
_SORT = """
document.querySelectorAll("th").forEach(th => th.addEventListener("click", () => {
  const table = th.closest("table"), body = table.tBodies[0], at = [...th.parentNode.children].indexOf(th);
  const up = th.dataset.up !== "1"; th.dataset.up = up ? "1" : "0";
  const key = row => { const t = row.cells[at].textContent, n = parseFloat(t); return isNaN(n) ? t : n; };
  [...body.rows].sort((a, b) => { const x = key(a), y = key(b), mixed = typeof x !== typeof y;
    const order = mixed ? (typeof x === "number" ? -1 : 1) : x < y ? -1 : x > y ? 1 : 0;
    return mixed || up ? order : -order; }).forEach(row => body.append(row));
}));
"""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of the page: its figures follow its tables; the settings of its runs are folded at its end."""

    title: str
    text: str
    tables: Sequence[Table]
    figures: Sequence[Figure]
    runs: Sequence[Run] = ()


def anchor(title: str) -> str:
    """A name for links within the page."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _flat(settings: Mapping[str, Any], under: str = "") -> dict[str, Any]:
    """Settings of settings with a dot between their names."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= (
            _flat(value, f"{under}{name}.") if isinstance(value, dict) else {under + name: value}
        )
    return found


def settings_tables(runs: Sequence[Run]) -> list[Table]:
    """Settings that every run shares, and those that differ between methods (seeds joined)."""
    methods: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        for name, value in _flat(run.settings).items():
            methods.setdefault(run.method, {}).setdefault(name, set()).add(_plain(value))
    names = sorted({name for found in methods.values() for name in found})
    values = {
        (m, name): " / ".join(sorted(found.get(name, {"–"})))
        for m, found in methods.items()
        for name in names
    }
    same = [name for name in names if len({values[m, name] for m in methods}) == 1]
    differ = [name for name in names if name not in same]
    tables = []
    if same and methods:
        first = next(iter(methods))
        rows = [[name, values[first, name]] for name in same]
        header = ("setting", "value")
        tables.append(
            Table(title="Settings of every run", caption="", header=header, rows=rows, left=2)
        )
    if differ:
        tables.append(
            Table(
                title="Settings by method",
                caption="",
                header=("method", *differ),
                rows=[[m, *(values[m, name] for name in differ)] for m in sorted(methods)],
                left=1 + len(differ),
            )
        )
    return tables


def _plain(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    return text if len(text) <= 200 else text[:197] + "..."


def _figure(figure: Figure, look: Mapping[str, Look]) -> str:
    panels = "".join(to_svgs(figure))
    return (
        f"<h4>{html.escape(figure.title)}</h4>"
        f'<p class="caption">{html.escape(figure.caption)}</p>{legend_html(figure, look)}'
        f'<div class="panels">{panels}</div>'
    )


def _section(section: Section, look: Mapping[str, Look]) -> str:
    parts = [f'<h2 id="{anchor(section.title)}">{html.escape(section.title)}</h2>']
    if section.text:
        parts.append(f'<p class="sub">{html.escape(section.text)}</p>')
    parts += [to_html(table) for table in section.tables]
    parts += [_figure(figure, look) for figure in section.figures]
    if found := settings_tables(section.runs):
        tables = "".join(to_html(table) for table in found)
        parts.append(f"<details><summary>Settings</summary>{tables}</details>")
    return "".join(parts)


def render(
    title: str,
    text: str,
    sections: Sequence[Section],
    footer: Sequence[str],
    look: Mapping[str, Look],
) -> str:
    """The whole page."""
    colours = " ".join(f"--m{i}: {colour};" for i, colour in enumerate(PALETTE))
    dark = " ".join(f"--m{i}: {colour};" for i, colour in _DARK.items())
    links = "".join(
        f'<a href="#{anchor(s.title)}">{html.escape(s.title)}</a>' for s in sections
    )  # fmt: skip
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title>"
        f"<style>{_CSS.replace('PALETTE', colours).replace('DARK', dark)}</style></head><body>"
        f'<h1>{html.escape(title)}</h1><p class="sub">{html.escape(text)}</p><nav>{links}</nav>'
        + "".join(_section(section, look) for section in sections)
        + "<footer>"
        + "".join(f"<p>{html.escape(line)}</p>" for line in footer)
        + f"</footer><script>{_SORT}</script></body></html>\n"
    )
