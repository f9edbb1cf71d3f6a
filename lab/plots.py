"""The report's figures, as PNG bytes. Values come in as an `Outcome`; nothing is computed here but places."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lab.figure_style import BLUE, FAINT, GREEN, INK, MUTED, ORANGE, RED, STYLE, png
from lab.outcome import Outcome
from lab.plot_experts import experts, slots


def _line(axes: Axes, values: Sequence[float | None], **style: Any) -> None:
    known = [(x, y) for x, y in enumerate(values) if y is not None]
    if known:
        axes.plot([x for x, _ in known], [y for _, y in known], **style)


def accuracy(outcome: Outcome) -> bytes:
    """Accuracy per round: the whole model on rows no device has, and the devices on rows of their own."""
    with plt.rc_context(STYLE):
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
        return png(figure)


def resources(outcome: Outcome) -> bytes:
    """Measured peak memory against the budget, and bytes down and up, per device."""
    devices = outcome.devices
    places = np.arange(len(devices))
    with plt.rc_context(STYLE):
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
        return png(figure)


FIGURES = {"accuracy": accuracy, "slots": slots, "experts": experts, "resources": resources}
"""Name of the file -> what draws it."""
