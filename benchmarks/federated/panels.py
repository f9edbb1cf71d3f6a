"""The panels of the scoreboard's figures: each function gives what draws one panel on axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from benchmarks.federated import run_facts
from benchmarks.federated.compare import Interval, t_interval
from benchmarks.federated.results import SCOPES, Results
from benchmarks.federated.score_tables import METRIC_WORDS, SCOPE_WORDS

PALETTE = (
    "#1f6feb", "#d9730d", "#2f9e44", "#d6336c", "#8250df", "#0c8599", "#b08800", "#e5484d", "#7b8794", "#a0522d",
    "#74a810", "#c13fd0",
)  # fmt: skip
DASHES: tuple[Literal["-"] | tuple[float, tuple[float, ...]], ...] = (
    "-",
    (0, (5, 2)),
    (0, (1.5, 1.5)),
)
MARKS = ("o", "s", "^")
Draw = Callable[[Axes], None]
Box = tuple[float, float, float, float]
"""Left, bottom, right, top."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """How a method is drawn, the same in every figure of a page."""

    colour: str
    dash: Literal["-"] | tuple[float, tuple[float, ...]]
    mark: str
    wide: bool


@dataclass(frozen=True, kw_only=True)
class Point:
    """A method in a scatter: means over seeds, and the lowest and highest seed of each."""

    name: str
    x: float
    y: float
    across: tuple[float, float]
    along: tuple[float, float]


def _ends(values: Mapping[int, float]) -> tuple[float, float]:
    """Lowest and highest seed."""
    return min(values.values()), max(values.values())


def _half(interval: Interval) -> float:
    return interval.half if np.isfinite(interval.half) else 0.0


def looks(methods: Sequence[str], ours: str) -> dict[str, Look]:
    """A look for each method, in the order given: ours first and wide, then colours, each with a dash of its own."""
    ordered = [ours, *(m for m in methods if m != ours)]
    return {
        m: Look(
            colour=PALETTE[i % len(PALETTE)],
            # Neighbours differ in dash as well, for those who see the colours as alike.
            dash=DASHES[(i + i // len(PALETTE)) % len(DASHES)],
            mark=MARKS[(i + i // len(PALETTE)) % len(MARKS)],
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


def _overlap(a: Box, b: Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _name_points(axes: Axes, points: Sequence[Point], look: Mapping[str, Look]) -> None:
    """Write each point's name near it where it overlaps least with points, bars and names; in points (1/72 inch)."""
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    drawing.draw_without_rendering()  # fixes the layout, so that data can be turned into places
    to_points = 72 / drawing.dpi

    def place(x: float, y: float) -> tuple[float, float]:
        found = axes.transData.transform((x, y)) * to_points
        return float(found[0]), float(found[1])

    frame = axes.get_window_extent()
    taken: list[Box] = []
    for point in points:
        x, y = place(point.x, point.y)
        left, right = (place(end, point.y)[0] for end in point.across)
        low, high = (place(point.x, end)[1] for end in point.along)
        taken += [
            (x - 4, y - 4, x + 4, y + 4),
            (left, y - 1, right, y + 1),
            (x - 1, low, x + 1, high),
        ]
    for point in sorted(points, key=lambda p: -p.y):
        x, y = place(point.x, point.y)
        width, height = 4.6 * len(point.name) + 2, 9.0
        options: list[tuple[float, tuple[float, float], Box]] = []
        for up in (-4, 4, -12, 10, -20, 18, -28, 26):
            for dx in (6.0, -6 - width, -width / 2):
                if dx == -width / 2 and -12 < up < 6:
                    continue  # on the point itself
                area = (x + dx, y + up, x + dx + width, y + up + height)
                cost = sum(_overlap(area, other) for other in taken) + 1.2 * abs(up + 4)
                outside = max(0.0, area[2] - frame.x1 * to_points) + max(
                    0.0, frame.x0 * to_points - area[0]
                )
                options.append((cost + 40 * outside, (dx, up), area))
        _, offset, area = min(options)
        taken.append(area)
        axes.annotate(
            point.name,
            (point.x, point.y),
            xytext=offset,
            textcoords="offset points",
            fontsize=8,
            color=look[point.name].colour,
            fontweight="bold" if look[point.name].wide else "normal",
        )


def _scatter(axes: Axes, points: Sequence[Point], look: Mapping[str, Look]) -> None:
    """Points with their seeds' ranges and names."""
    for point in points:
        style = look[point.name]
        for x, y in (
            (point.across, (point.y, point.y)),
            ((point.x, point.x), point.along),
        ):
            axes.plot(x, y, color=style.colour, linewidth=1, alpha=0.4, zorder=1)
        size = 8 if style.wide else 5.5
        axes.plot(
            [point.x], [point.y], style.mark, color=style.colour, markersize=size, zorder=3
        )  # fmt: skip
    axes.margins(0.12)
    _name_points(axes, points, look)


def tension(results: Results, look: Mapping[str, Look]) -> Draw:
    """A panel with the global model's mean of tasks against the devices', a point a method."""

    def draw(axes: Axes) -> None:
        points = []
        for method in results.runs:
            found = [results.task_means(method, scope) for scope in SCOPES]
            if all(found):
                x, y = (float(np.mean(list(f.values()))) for f in found)
                ends = [_ends(f) for f in found]
                points.append(Point(name=method, x=x, y=y, across=ends[0], along=ends[1]))
        axes.set(
            title="Global model against devices",
            xlabel="global model, mean of tasks %",
            ylabel="devices, mean of tasks %",
        )
        axes.grid()
        if points:
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
                x, y = both.mean / 1e6, float(np.mean(list(found.values())))
                points.append(Point(name=method, x=x, y=y, across=(x, x), along=_ends(found)))
        axes.set(
            title="Bytes against score",
            xlabel="MB up and down per run (log scale)",
            ylabel="global model, mean of tasks %",
            xscale="log",
        )
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid()
        if points:
            _scatter(axes, points, look)

    return draw


def budgets(suites: Mapping[int, Results], look: Mapping[str, Look], scope: str) -> Draw:
    """A panel with selection methods by budget, each with its interval over seeds."""

    def draw(axes: Axes) -> None:
        names = sorted({m for r in suites.values() for m in r.runs})
        methods = sorted(names, key=lambda m: look[m].wide)
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
            halves = [_half(i) for i in found.values()]
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
