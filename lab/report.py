"""The end of a run: one table on the terminal, one HTML file that needs no other."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from lab.live import megabytes, percent
from lab.outcome import DeviceOutcome, Outcome, kind_order

COLUMNS = (
    "device",
    "profile",
    "experts per layer",
    "budget MB",
    "peak MB",
    "baseline MB",
    "down MB",
    "up MB",
    "before",
    "after",
)
CAPTIONS = {
    "accuracy": "Blue: the whole fp32 model with the global adapter, loaded by stock PEFT. Grey and orange: the 4-bit "
    "part of the model that a device holds, on rows it held back, before it trains further in that round.",
    "slots": "What the planner made room for, over all layers: how the frozen weights of an expert are stored, and the "
    "rank of the LoRA trained on them. An expert in a frozen slot is used but not trained.",
    "experts": "Dark: trained in every round. A ring: held in some round, but only in a frozen slot. The server "
    "chooses a device's experts anew for every round.",
    "resources": "Memory is the highest resident size over all rounds less the process's resident size just before the "
    "program was opened (the baseline in the table).",
}
_CSS = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #1f2933; background: #fff;
       max-width: 1020px; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
.sub, figcaption { color: #616e7c; } figcaption { font-size: .85rem; max-width: 62rem; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.card { border: 1px solid #e4e7eb; border-radius: 8px; padding: .6rem 1rem; min-width: 8.5rem; }
.card b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums; }
.card span { color: #616e7c; font-size: .85rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th { text-align: left; color: #616e7c; font-weight: 600; } th, td { padding: .35rem .6rem .35rem 0; }
tr { border-bottom: 1px solid #e4e7eb; } .n { text-align: right; } .bad { color: #c92a2a; font-weight: 600; }
.wide { overflow-x: auto; } figure { margin: 0 0 1.5rem; } img { max-width: 100%; height: auto; }
"""


def _mb(size: int) -> str:
    return f"{size / 2**20:.1f}"


def cells(device: DeviceOutcome) -> tuple[str, ...]:
    """One device's row of the table, as in COLUMNS. Memory in 2**20 bytes, traffic in 10**6."""
    return (
        device.name,
        device.profile,
        "+".join(map(str, device.experts)),
        _mb(device.budget_bytes),
        _mb(device.peak_bytes),
        _mb(device.baseline_bytes),
        megabytes(device.bytes_down),
        megabytes(device.bytes_up),
        percent(device.before),
        percent(device.after),
    )


def slots_in_words(device: DeviceOutcome) -> str:
    """Its slots by kind, the largest rank first: "12 int8 of rank 8, 20 int4 frozen"."""
    words = []
    for kind in sorted(device.slots, key=kind_order):
        format, rank = kind.split("/")
        how = f"of rank {rank}" if rank != "0" else "frozen"
        words.append(f"{device.slots[kind]} {format} {how}")
    return ", ".join(words) or "slots not known"


def summary(outcome: Outcome) -> list[tuple[str, str]]:
    """(what, value): the numbers of the whole run."""
    facts = [
        ("global accuracy before", percent(outcome.base_accuracy)),
        ("global accuracy after", percent(outcome.final_accuracy)),
    ]
    if outcome.ceiling is not None:
        facts.append(("central training, same samples", percent(outcome.ceiling)))
    fitting = sum(device.fits for device in outcome.devices)
    return [
        *facts,
        ("rounds of training", str(sum(r.work == "train" for r in outcome.rounds))),
        ("samples trained on", f"{outcome.samples:,}"),
        ("devices that worked to the end, within budget", f"{fitting} of {len(outcome.devices)}"),
        ("run time", f"{outcome.seconds:.0f} s"),
    ]


def print_table(outcome: Outcome, console: Console) -> None:
    """The table of the issue: what each device had, used and gained."""
    table = Table(title=f"{outcome.name}: {outcome.data}", title_justify="left", box=None)
    table.padding = (0, 1, 0, 0)
    for index, name in enumerate(COLUMNS):
        # Heads break before their last word, so that the table fits 90 columns.
        table.add_column(
            "\n".join(name.rsplit(" ", 1)), justify="left" if index < 3 else "right", no_wrap=True
        )
    for device in outcome.devices:
        table.add_row(*cells(device), style=None if device.fits else "red")
    console.print()
    console.print(table)
    for device in outcome.devices:
        console.print(f"  {device.name}: {slots_in_words(device)}", highlight=False)
    for what, value in summary(outcome):
        console.print(f"  {what}: {value}", highlight=False)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    def row(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(
            f'<{tag}{"" if i < left else " class=n"}>{html.escape(v)}</{tag}>'
            for i, v in enumerate(values)
        ) + "</tr>"  # fmt: skip

    body = "".join(row("td", values) for values in rows)
    return (
        f'<div class="wide"><table><thead>{row("th", header)}</thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _faults(outcome: Outcome) -> list[tuple[str, str, str]]:
    found = []
    for entry in outcome.rounds:
        found += [(str(entry.round), name, "no update in time") for name in entry.missing]
        found += [(str(entry.round), name, f"rejected: {why}") for name, why in entry.rejected]
    return found


def render(outcome: Outcome, figures: Mapping[str, bytes]) -> str:
    """The whole page; `figures` are PNG bytes by name."""
    title = html.escape(f"Expertfleet: {outcome.name}")
    devices = len(outcome.devices)
    profiles = len({device.profile for device in outcome.devices})
    backends = ", ".join(sorted({device.backend for device in outcome.devices}))
    cards = "".join(
        f'<div class="card"><b>{html.escape(value)}</b><span>{html.escape(what)}</span></div>'
        for what, value in summary(outcome)
    )
    parts = [
        f"<h1>{title}</h1>",
        f'<p class="sub">{devices} emulated devices of {profiles} profiles, backend {html.escape(backends)}, '
        f"trained on {html.escape(outcome.data)} ({outcome.labels} labels). "
        "Device budgets are scaled down for the small base, as the scenario file says.</p>",
        f'<div class="cards">{cards}</div>',
        "<h2>Devices</h2>",
        _table(COLUMNS, [cells(device) for device in outcome.devices], 3),
    ]
    for name, png in figures.items():
        data = base64.b64encode(png).decode()
        parts.append(
            f'<h2>{name.capitalize()}</h2><figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
        )
    parts += [
        "<h2>Rounds</h2>",
        _table(
            ("round", "work", "closed by", "updates", "adapter", "seconds", "global accuracy"),
            [
                (
                    str(r.round),
                    r.work,
                    r.closed_by,
                    str(devices - len(r.missing) - len(r.rejected)),
                    str(r.version),
                    f"{r.seconds:.1f}",
                    percent(outcome.global_accuracy[r.version]),
                )
                for r in outcome.rounds
            ],
            3,
        ),
    ]
    if faults := _faults(outcome):
        parts += ["<h2>Faults</h2>", _table(("round", "device", "what happened"), faults, 3)]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write(outcome: Outcome, folder: Path) -> Path:
    """Write `report.html` and the figures as `<name>.png`; returns the page's path."""
    from lab.plots import FIGURES  # matplotlib takes a second to load

    folder.mkdir(parents=True, exist_ok=True)
    figures = {name: draw(outcome) for name, draw in FIGURES.items()}
    for name, png in figures.items():
        (folder / f"{name}.png").write_bytes(png)
    page = folder / "report.html"
    partial = page.with_suffix(".tmp")
    partial.write_text(render(outcome, figures), encoding="utf-8")
    os.replace(partial, page)
    return page
