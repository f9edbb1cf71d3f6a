"""The panels of the scoreboard's figures: each function gives what draws one panel on axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, ScalarFormatter

from benchmarks.federated import run_facts
from benchmarks.federated.compare import t_interval
from benchmarks.federated.results import SCOPES, Results
from benchmarks.federated.score_tables import METRIC_WORDS, SCOPE_WORDS

PALETTE = (
    "#1f6feb", "#d9730d", "#2f9e44", "#d6336c", "#8250df", "#0c8599", "#b08800", "#e5484d", "#7b8794", "#a0522d",
)  # fmt: skip
DASHES: tuple[Literal["-"] | tuple[float, tuple[float, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
)
MARKS = ("o", "s", "^")
Draw = Callable[[Axes], None]


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn, the same in every figure of a page."""

    colour: str
    dash: Literal["-"] | tuple[float, tuple[float, ...]]
    mark: str
    wide: bool


def looks(methods: Sequence[str], ours: str) -> dict[str, Look]:
    """A look for each method: ours first in the palette and wide, the others in the order of their names."""
    ordered = sorted(methods, key=lambda m: (m != ours, m))
    if ours not in methods:
        ordered = [ours, *ordered]
    return {
        m: Look(
            colour=PALETTE[i % len(PALETTE)],
            dash=DASHES[i // len(PALETTE) % len(DASHES)],
            mark=MARKS[i // len(PALETTE) % len(MARKS)],
            wide=m == ours,
        )
        for i, m in enumerate(ordered)
    }


def curve(results: Results, look: Mapping[str, Look], scope: str, task: str, metric: str) -> Draw:
    """A panel with a score by round: seeds as thin lines, their mean as a bold one."""

    def draw(axes: Axes) -> None:
        for method in sorted(results.runs, key=lambda m: look[m].wide):
            style = look[method]
            level = 3 if style.wide else 2
            for seed in results.runs[method]:
                rounds, values = results.curve(method, seed, scope, task, metric)
                axes.plot(rounds, values, color=style.colour, alpha=0.3, linewidth=0.6, zorder=1)
            rounds, values = results.mean_curve(method, scope, task, metric)
            axes.plot(
                rounds,
                values,
                color=style.colour,
                linestyle=style.dash,
                linewidth=2.6 if style.wide else 1.5,
                zorder=level,
            )
        split = results.curve_split(scope, task, metric).replace("_", " ")
        axes.set(title=f"{task} ({split} rows)", xlabel="round", ylabel=METRIC_WORDS[metric])
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(axis="y")

    return draw


def coverage(results: Results, look: Mapping[str, Look], name: str, title: str) -> Draw:
    """A panel with a diagnostic of the rounds, mean over seeds."""

    def draw(axes: Axes) -> None:
        for method, seeds in results.runs.items():
            series = [
                {r.round: v for r in run.rounds if (v := getattr(r, name)) is not None}
                for run in seeds.values()
            ]
            shared = sorted(set.intersection(*(set(s) for s in series)))
            style = look[method]
            axes.plot(
                shared,
                [np.mean([s[r] for s in series]) for r in shared],
                color=style.colour,
                linestyle=style.dash,
                linewidth=2.6 if style.wide else 1.5,
            )
        axes.set(title=title, xlabel="round", ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.grid(axis="y")

    return draw


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float, Look]]) -> None:
    """Write each point's name beside it, at the place of eight that overlaps least; places in points (1/72 inch)."""
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    drawing.draw_without_rendering()  # fixes the layout, so that data can be turned into places
    to_points = 72 / drawing.dpi
    places = [tuple(axes.transData.transform((x, y)) * to_points) for _, x, y, _ in points]
    box = axes.get_window_extent()
    right, left = box.x1 * to_points, box.x0 * to_points
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    for (name, x, y, style), (px, py) in zip(points, places, strict=True):
        width, height = 4.7 * len(name) + 2, 9.0
        best: tuple[float, tuple[float, float], tuple[float, float, float, float]] | None = None
        for dx, dy in ((6, -4), (-6 - width, -4), (-width / 2, 6), (-width / 2, -14),
                       (6, 5), (6, -13), (-6 - width, 5), (-6 - width, -13)):  # fmt: skip
            area = (px + dx, py + dy, px + dx + width, py + dy + height)
            cost = sum(
                max(0.0, min(area[2], t[2]) - max(area[0], t[0]))
                * max(0.0, min(area[3], t[3]) - max(area[1], t[1]))
                for t in taken
            )
            cost += 40 * (max(0.0, area[2] - right) + max(0.0, left - area[0]))
            if best is None or cost < best[0] - 1e-9:
                best = (cost, (dx, dy), area)
        assert best is not None
        taken.append(best[2])
        axes.annotate(
            name,
            (x, y),
            xytext=best[1],
            textcoords="offset points",
            fontsize=8,
            color=style.colour,
            fontweight="bold" if style.wide else "normal",
        )


def _scatter(
    axes: Axes, points: Sequence[tuple[str, float, float, float, float]], look: Mapping[str, Look]
) -> None:
    """Points (name, x, y, half width of x, of y) with their intervals and names."""
    for name, x, y, dx, dy in points:
        style = look[name]
        axes.errorbar(
            x,
            y,
            xerr=dx if np.isfinite(dx) and dx > 0 else None,
            yerr=dy if np.isfinite(dy) and dy > 0 else None,
            fmt=style.mark,
            color=style.colour,
            markersize=8 if style.wide else 6,
            elinewidth=0.8,
            alpha=0.95,
        )
    axes.margins(0.12)
    _name_points(axes, [(name, x, y, look[name]) for name, x, y, _, _ in points])


def tension(results: Results, look: Mapping[str, Look]) -> Draw:
    """A panel with the global model's mean of tasks against the devices', a point a method."""

    def draw(axes: Axes) -> None:
        points = []
        for method in results.runs:
            found = [results.task_means(method, scope) for scope in SCOPES]
            if all(found):
                x, y = (t_interval(list(f.values())) for f in found)
                points.append((method, x.mean, y.mean, x.half, y.half))
        axes.set(
            title="Global model against devices",
            xlabel="global model, mean of tasks %",
            ylabel="devices, mean of tasks %",
        )
        axes.grid()
        _scatter(axes, points, look)

    return draw


def traffic(results: Results, look: Mapping[str, Look]) -> Draw:
    """A panel with the mean of tasks of the global model against the bytes of the run."""

    def draw(axes: Axes) -> None:
        points = []
        for method in results.runs:
            found = results.task_means(method, "global")
            both = results.over_seeds(method, run_facts.bytes_both)
            if found and both is not None and both.mean > 0:
                y = t_interval(list(found.values()))
                points.append((method, both.mean / 1e6, y.mean, np.nan, y.half))
        axes.set(
            title="Bytes against score",
            xlabel="MB up and down, whole run (10^6 bytes, log scale)",
            ylabel="global model, mean of tasks %",
            xscale="log",
        )
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid()
        if points:
            _scatter(axes, points, look)

    return draw


def budgets(suites: Mapping[int, Results], look: Mapping[str, Look], scope: str) -> Draw:
    """A panel with selection methods by budget, each with its interval over seeds."""

    def draw(axes: Axes) -> None:
        methods = sorted({m for r in suites.values() for m in r.runs}, key=lambda m: look[m].wide)
        for index, method in enumerate(methods):
            found = {
                b: t_interval(list(v.values()))
                for b, r in sorted(suites.items())
                if method in r.runs and (v := r.task_means(method, scope))
            }
            style = look[method]
            # Side by side, so that the intervals of one budget can be read.
            shift = (index - (len(methods) - 1) / 2) * 0.55
            means = [i.mean for i in found.values()]
            halves = [i.half if np.isfinite(i.half) else 0.0 for i in found.values()]
            axes.errorbar(
                [b + shift for b in found],
                means,
                yerr=halves,
                color=style.colour,
                linestyle=style.dash,
                marker=style.mark,
                markersize=6 if style.wide else 4.5,
                linewidth=2.4 if style.wide else 1.3,
                elinewidth=0.9,
                capsize=2,
            )
        axes.set(
            title=SCOPE_WORDS[scope], xlabel="budget, % of the experts", ylabel="mean of tasks, %"
        )
        axes.set_xticks(sorted(suites))
        axes.grid(axis="y")

    return draw
