"""The scoreboard's page, tables and figures from the raw lines of its runs.

    python -m benchmarks.federated.page --runs DIR --out docs/scoreboard

Reads DIR/<suite>/<method>/<seed>.jsonl and writes into --out: index.html (needs no other file), figures as PNG,
rounds.csv (every round of every finished run), results.csv (every last value) and tables/<suite>.md. Unfinished and
missing runs are listed and never counted. The same runs give the same bytes. Ends with 2 and one line on a malformed
run.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.federated import csv_files, page_sections
from benchmarks.federated.figures import to_png
from benchmarks.federated.page_html import anchor, render
from benchmarks.federated.panels import looks
from benchmarks.federated.read_runs import Run, RunsError, read_runs
from benchmarks.federated.results import Results, kind
from benchmarks.federated.revision import commit
from benchmarks.federated.tables import to_markdown

TITLE = "Expertfleet: scoreboard"
TEXT = (
    "Federated fine-tuning of a Mixture-of-Experts language model on simulated devices with different memory budgets. "
    "Two scores, never mixed: the global model on test rows (what the operator gets) and each device's own part of the "
    "model on its own held-back rows (what the owners of the devices get). Click a column's head to sort by it."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        epilog="example: python -m benchmarks.federated.page --runs runs --out docs/scoreboard",
    )
    parser.add_argument("--runs", type=Path, required=True, help="folder of the raw lines")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--tuned", type=Path, help="learning rates found by --tune, to be shown")
    parser.add_argument("--ours", default="ours", help="method compared with the baselines")
    parser.add_argument("--reference", default="fedit", help="method whose bytes are 100 %%")
    arguments = parser.parse_args(argv)
    words = sys.argv[1:] if argv is None else argv
    try:
        runs = read_runs(arguments.runs)
        page = write(
            runs,
            arguments.out,
            ours=arguments.ours,
            reference=arguments.reference,
            tuned=arguments.tuned,
            command=shlex.join(["python", "-m", "benchmarks.federated.page", *words]),
        )
    except (RunsError, OSError) as error:
        print(f"benchmarks.federated.page: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


def write(
    runs: Sequence[Run],
    out: Path,
    *,
    ours: str,
    reference: str,
    command: str,
    tuned: Path | None = None,
) -> Path:
    """Write everything into `out`; returns the page's path."""
    finished = [run for run in runs if run.finished]
    tuning = [page_sections.tuning_section(tuned)] if tuned else []
    suites = [
        Results(name, finished, ours=ours, reference=reference)
        for name in sorted({run.suite for run in finished})
    ]
    leading = [r for r in suites if kind(r.suite) == "main"]
    # Methods of the main suites get the first looks, so that their colours differ.
    first = sorted({m for r in leading for m in r.runs})
    look = looks(list(dict.fromkeys([*first, *sorted({r.method for r in finished})])), ours)
    others = [r for r in suites if kind(r.suite) in page_sections.VARIANTS]
    sections = [
        *([page_sections.overview(leading)] if leading else []),
        *(page_sections.suite_section(r, look) for r in leading),
        *page_sections.robustness_section(leading),
        *page_sections.selection_section(suites, look),
        *(page_sections.variant_section(r) for r in others),
        *tuning,
        page_sections.absent(runs),
    ]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for section in sections:
        for figure in section.figures:
            _replace(out / f"{figure.name}.png", to_png(figure, look))
        text = "\n".join(to_markdown(table) for table in section.tables)
        if text:
            _replace(out / "tables" / f"{anchor(section.title)}.md", text.encode())
    _replace(out / "rounds.csv", csv_files.per_round(finished).encode())
    _replace(out / "results.csv", csv_files.last_values(finished).encode())
    page = out / "index.html"
    _replace(page, render(TITLE, TEXT, sections, footer(runs, command), look).encode())
    return page


def footer(runs: Sequence[Run], command: str) -> list[str]:
    """Where the numbers come from: command, commits, runs and seeds."""
    finished = [run for run in runs if run.finished]
    seeds = sorted({run.seed for run in finished})
    hours = sum(run.seconds or 0.0 for run in finished) / 3600
    lines = [
        f"Made by: {command}",
        f"Page at commit {commit()}. Runs at commit {_joined(r.settings.get('commit') for r in finished)}.",
        f"{len(finished)} finished runs of {len({r.suite for r in finished})} suites, seeds {_joined(seeds)}; "
        f"{hours:.1f} hours of computation.",
        "Every last value is in results.csv, every round in rounds.csv, each table as markdown under tables/, beside "
        "this page. Intervals are 95 %. Device time is simulated.",
    ]
    if len(seeds) < 3:
        lines.append("Fewer than three seeds: the intervals say little.")
    return lines


def _joined(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(str(v) for v in values if v is not None)) or "not recorded"


def _replace(path: Path, content: bytes) -> None:
    partial = path.with_name(f"{path.name}.tmp")
    partial.write_bytes(content)
    os.replace(partial, path)


if __name__ == "__main__":
    sys.exit(main())
