"""The report's figures, as PNG bytes. Values come in as an `Outcome`; nothing is computed here but places."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lab.outcome import Outcome

INK, MUTED, FAINT, GRID = "#1f2933", "#616e7c", "#b8c2cc", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#1f6feb", "#d9730d", "#2f9e44", "#c92a2a"
_SHADES = LinearSegmentedColormap.from_list("shades", ["#f3f6fa", "#9dc3f5", "#1f6feb", "#0b2a5b"])
_STYLE: Any = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlesize": 11,
    "axes.titlepad": 10,
    "axes.grid": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": GRID,
    "legend.frameon": False,
    "figure.dpi": 150,
}


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the date and the software's version the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _line(axes: Axes, values: Sequence[float | None], **style: Any) -> None:
    known = [(x, y) for x, y in enumerate(values) if y is not None]
    if known:
        axes.plot([x for x, _ in known], [y for _, y in known], **style)


def accuracy(outcome: Outcome) -> bytes:
    """Accuracy per round: the whole model on rows no device has, and the devices on rows of their own."""
    with plt.rc_context(_STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 4.0), layout="constrained")
        for index, device in enumerate(outcome.devices):
            label = "each device, own rows and experts" if index == 0 else None
            _line(axes, device.accuracy, color=FAINT, linewidth=1, label=label)
        _line(
            axes,
            outcome.mean_device_accuracy(),
            color=ORANGE,
            linewidth=2,
            marker="o",
            markersize=4,
            label="mean of the devices",
        )
        _line(
            axes,
            outcome.global_accuracy,
            color=BLUE,
            linewidth=2.5,
            marker="o",
            markersize=5,
            label=f"whole model, {outcome.test_rows} rows of no device",
        )
        if outcome.ceiling is not None:
            axes.axhline(outcome.ceiling, color=GREEN, linewidth=1.5, linestyle=(0, (5, 3)))
            axes.annotate(
                f"central training {100 * outcome.ceiling:.1f}%",
                (0, outcome.ceiling),
                xytext=(2, 4),
                textcoords="offset points",
                color=GREEN,
                fontsize=9,
            )
        chance = 1 / outcome.labels
        axes.axhline(chance, color=MUTED, linewidth=1, linestyle=":")
        axes.annotate(
            f"chance, {outcome.labels} labels",
            (len(outcome.global_accuracy) - 1, chance),
            xytext=(0, 4),
            textcoords="offset points",
            color=MUTED,
            fontsize=9,
            ha="right",
        )
        for version in (0, len(outcome.global_accuracy) - 1):
            value = outcome.global_accuracy[version]
            if value is not None:
                axes.annotate(
                    f"{100 * value:.1f}%",
                    (version, value),
                    xytext=(8 if version else -8, -4),
                    textcoords="offset points",
                    ha="left" if version else "right",
                    color=BLUE,
                    fontweight="bold",
                )
        axes.set(
            title="Accuracy per round",
            xlabel="rounds of training",
            ylim=(0, 1.06),
            xlim=(-0.6, len(outcome.global_accuracy) - 0.3),
        )
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y")
        handles, names = axes.get_legend_handles_labels()
        figure.legend(
            handles[::-1],
            names[::-1],
            loc="outside lower center",
            ncols=3,
            fontsize=8.5,
            columnspacing=1.4,
        )
        return _png(figure)


def experts(outcome: Outcome) -> bytes:
    """Experts x devices per layer: in how many rounds each device trained each expert."""
    names = [device.name for device in outcome.devices]
    most = max(1, sum(r.work == "train" for r in outcome.rounds))
    columns = min(2, len(outcome.layers))
    rows = -(-len(outcome.layers) // columns)
    with plt.rc_context(_STYLE):
        figure, grid = plt.subplots(
            rows,
            columns,
            figsize=(9.2, (0.28 * len(names) + 1.1) * rows + 0.5),
            layout="constrained",
            squeeze=False,
            sharex=True,
            sharey=True,
        )
        for axes in grid.flat[len(outcome.layers) :]:
            axes.set_visible(False)
        for index, (axes, layer) in enumerate(zip(grid.flat, outcome.layers, strict=False)):
            held = np.stack([outcome.trained_rounds[name][index] for name in names])
            image = axes.imshow(held, cmap=_SHADES, vmin=0, vmax=most, aspect="auto")
            axes.set_yticks(range(len(names)), names)
            step = max(1, outcome.experts // 16)
            axes.set_xticks(range(0, outcome.experts, step))
            axes.tick_params(length=0, labelsize=8)
            for spine in axes.spines.values():
                spine.set_visible(False)
            axes.set_xticks(np.arange(-0.5, outcome.experts), minor=True)
            axes.set_yticks(np.arange(-0.5, len(names)), minor=True)
            axes.grid(which="minor", color="white", linewidth=1.5)
            axes.tick_params(which="minor", length=0)
            nobody = int((held.sum(0) == 0).sum())
            note = f", {nobody} on no device" if nobody else ""
            axes.set_title(f"layer {layer}: {outcome.experts - nobody} experts trained{note}")
            if index >= len(outcome.layers) - columns:
                axes.set_xlabel("expert")
        engine: Any = figure.get_layout_engine()
        engine.set(hspace=0.06)
        bar = figure.colorbar(image, ax=grid, shrink=0.6, pad=0.015, aspect=18)
        bar.set_label("rounds in which it was trained")
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
        bar.outline.set_visible(False)
        return _png(figure)


def resources(outcome: Outcome) -> bytes:
    """Measured peak memory against the budget, and bytes down and up, per device."""
    devices = outcome.devices
    places = np.arange(len(devices))
    with plt.rc_context(_STYLE):
        figure, (memory, traffic) = plt.subplots(
            1, 2, figsize=(9.2, 0.42 * len(devices) + 1.7), layout="constrained", sharey=True
        )
        peaks = [d.peak_bytes / 2**20 for d in devices]
        budgets = [d.budget_bytes / 2**20 for d in devices]
        memory.barh(places, budgets, height=0.66, color="#e9edf2", label="budget")
        memory.barh(
            places,
            peaks,
            height=0.4,
            color=[BLUE if d.fits else RED for d in devices],
            label="measured peak",
        )
        for place, peak, budget in zip(places, peaks, budgets, strict=True):
            memory.plot([budget, budget], [place - 0.33, place + 0.33], color=INK, linewidth=1.5)
            text = f"{peak:.1f} of {budget:.1f}"
            memory.annotate(
                text, (max(peak, budget), place), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=9, color=INK,
            )  # fmt: skip
        if all(d.predicted_bytes >= 0 for d in devices):
            memory.scatter(
                [d.predicted_bytes / 2**20 for d in devices],
                places,
                marker="D",
                s=22,
                facecolor="white",
                edgecolor=INK,
                zorder=3,
                label="predicted by export",
            )
        memory.set(
            title="Memory of the program, MB (2^20)", xlim=(0, 1.32 * max([*budgets, *peaks]))
        )
        memory.set_yticks(places, [f"{d.name}\n{d.profile}" for d in devices], fontsize=9)
        memory.invert_yaxis()
        down = np.array([d.bytes_down / 1e6 for d in devices])
        up = np.array([d.bytes_up / 1e6 for d in devices])
        traffic.barh(places, down, height=0.5, color=BLUE, label="down: program, experts, adapters")
        traffic.barh(places, up, height=0.5, left=down, color=ORANGE, label="up: updates")
        for place, d, u in zip(places, down, up, strict=True):
            traffic.annotate(
                f"{d:.1f} + {u:.1f}", (d + u, place), xytext=(5, 0), textcoords="offset points",
                va="center", fontsize=9, color=INK,
            )  # fmt: skip
        traffic.set(title="Traffic of the whole run, MB (10^6)", xlim=(0, 1.3 * (down + up).max()))
        for axes in (memory, traffic):
            axes.tick_params(length=0)
            axes.spines["left"].set_visible(False)
            axes.legend(
                loc="upper left", bbox_to_anchor=(-0.02, -0.1), ncols=3, fontsize=8.5,
                handlelength=1.2, columnspacing=1.2,
            )  # fmt: skip
        return _png(figure)


FIGURES = {"accuracy": accuracy, "experts": experts, "resources": resources}
"""Name of the file -> what draws it."""
