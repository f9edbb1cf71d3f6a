"""The scoreboard's figures: panels with a legend, as one PNG or as SVG for the page.

In the page's SVG every ink and every method's colour is a CSS variable, so a figure follows the light or dark page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

from benchmarks.federated.panels import (
    PALETTE,
    Draw,
    Look,
    budgets,
    coverage,
    curve,
    tension,
    traffic,
)
from benchmarks.federated.read_runs import PRIMARY
from benchmarks.federated.results import SCOPES, Results
from benchmarks.federated.score_tables import SCOPE_WORDS
from lab.figure_style import FAINT, GRID, INK, MUTED, STYLE, png

COLOURS = {INK: "ink", MUTED: "muted", FAINT: "faint", GRID: "line"}
"""Hex colours of the house style -> the page's CSS variables."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """Panels that share a legend of `methods`, none where points are named; with `marks` it has marks on the lines."""

    name: str
    title: str
    caption: str
    panels: Sequence[Draw]
    methods: Sequence[str]
    columns: int
    marks: bool = False


def suite_figures(results: Results, look: Mapping[str, Look]) -> list[Figure]:
    """The figures of one suite: curves in both scopes, the two scatters, coverage."""
    methods = list(results.runs)
    figures = []
    for scope in SCOPES:
        shown = [
            pair
            for pair in results.measures
            if any(len(results.mean_curve(m, scope, *pair)[0]) > 1 for m in methods)
        ]
        # Accuracy, F1 and ROUGE-2 before the losses.
        shown.sort(key=lambda pair: (pair[1] not in PRIMARY, pair))
        if shown:
            figures.append(
                Figure(
                    name=f"{results.suite}_curves_{scope}",
                    title=f"{SCOPE_WORDS[scope]}: learning curves",
                    caption="Bold: mean over seeds. Thin: each seed. Round 0 is before training.",
                    panels=[curve(results, look, scope, *pair) for pair in shown],
                    methods=methods,
                    columns=min(3, len(shown)),
                )
            )
    figures.append(
        Figure(
            name=f"{results.suite}_tension",
            title="Coverage against relevance",
            caption="Left: up is better for the owners of the devices, right is better for the operator. "
            "Right: left is cheaper. Bars: lowest and highest seed.",
            panels=[tension(results, look), traffic(results, look)],
            methods=(),
            columns=2,
        )
    )
    curves = (("never_trained", "Experts never trained"), ("coverage_cv", "Coverage CV"))
    has = [
        (name, title)
        for name, title in curves
        if any(
            getattr(r, name) is not None
            for seeds in results.runs.values()
            for run in seeds.values()
            for r in run.rounds
        )
    ]
    if has:
        figures.append(
            Figure(
                name=f"{results.suite}_coverage",
                title="Coverage by round",
                caption="Experts that no device has trained so far, and the coefficient of variation of how often each "
                "expert was trained. Mean over seeds; lower is a more even coverage.",
                panels=[coverage(results, look, *pair) for pair in has],
                methods=methods,
                columns=len(has),
            )
        )
    return figures


def selection_figure(suites: Mapping[int, Results], look: Mapping[str, Look]) -> Figure:
    """Selection methods at equal budget, a panel for each scope."""
    methods = sorted({m for r in suites.values() for m in r.runs})
    return Figure(
        name="selection",
        title="Selection at equal budget",
        caption="Mean over seeds with its 95 % interval (Student's t); points of one budget stand side by side.",
        panels=[budgets(suites, look, scope) for scope in SCOPES],
        methods=methods,
        columns=2,
        marks=True,
    )


def to_png(figure: Figure, look: Mapping[str, Look]) -> bytes:
    """All panels and the legend as one PNG on white."""
    rows = -(-len(figure.panels) // figure.columns)
    with plt.rc_context(STYLE):
        drawing, grid = plt.subplots(
            rows,
            figure.columns,
            figsize=(4.0 * figure.columns + 0.2, 3.1 * rows + 0.6),
            layout="constrained",
            squeeze=False,
        )
        lines = [
            Line2D(
                [], [], color=look[m].colour, linestyle=look[m].dash, linewidth=2.6 if look[m].wide else 1.6,
                marker=look[m].mark if figure.marks else "", markersize=4, label=m,
            )
            for m in sorted(figure.methods, key=lambda m: (not look[m].wide, m))
        ]  # fmt: skip
        if lines:
            drawing.legend(
                handles=lines,
                loc="outside lower center",
                ncols=min(len(lines), 2 * figure.columns + 1),
                fontsize=8.5,
            )
        for axes in grid.flat[len(figure.panels) :]:
            axes.set_visible(False)
        for axes, draw in zip(grid.flat, figure.panels, strict=False):
            draw(axes)
        return png(drawing)


def _svg(draw: Draw, salt: str) -> str:
    """One panel as inline SVG without namespaces, metadata or fixed colours."""
    with plt.rc_context(STYLE | {"svg.fonttype": "none", "svg.hashsalt": salt}):
        drawing, axes = plt.subplots(figsize=(4.4, 3.3), layout="constrained")
        draw(axes)
        buffer = io.StringIO()
        drawing.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
        plt.close(drawing)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    text = re.sub(
        r' d="[^"]*"', lambda m: re.sub(r"(\.\d)\d+", r"\1", m[0].replace("\n", "")), text
    )
    text = re.sub(r"font: [^;\"]*?(\d+(?:\.\d+)?px)[^;\"]*", r"font-size: \1", text)
    for colour, name in COLOURS.items():
        text = text.replace(colour, f"var(--{name})")
    for index, colour in enumerate(PALETTE):
        text = text.replace(colour, f"var(--m{index})")
    return re.sub(r">\s+<", "><", text)


def to_svgs(figure: Figure) -> list[str]:
    """Every panel as inline SVG for the page; the legend is the page's."""
    return [_svg(draw, f"{figure.name}-{i}") for i, draw in enumerate(figure.panels)]


def legend_html(figure: Figure, look: Mapping[str, Look]) -> str:
    """The methods with a piece of their line."""
    if not figure.methods:
        return ""
    items = []
    for method in sorted(figure.methods, key=lambda m: (not look[m].wide, m)):
        style = look[method]
        dash = "" if isinstance(style.dash, str) else ",".join(str(2 * d) for d in style.dash[1])
        items.append(
            f'<span><svg viewBox="0 0 28 10" width="28" height="10" aria-hidden="true"><path d="M0 5H28" '
            f'stroke="var(--m{PALETTE.index(style.colour)})" stroke-width="{4 if style.wide else 2.5}" '
            f'stroke-dasharray="{dash}"/></svg>{html.escape(method)}</span>'
        )
    return f'<div class="legend">{"".join(items)}</div>'
