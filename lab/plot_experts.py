"""Figures about experts: what each device has room for, and who trained which."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.ticker import MaxNLocator

from lab.figure_style import FAINT, INK, MUTED, STYLE, png
from lab.outcome import Outcome, kind_order

_SHADES = LinearSegmentedColormap.from_list("shades", ["#f3f6fa", "#9dc3f5", "#1f6feb", "#0b2a5b"])
_WARM = LinearSegmentedColormap.from_list("warm", ["#faf4ee", "#f5c79a", "#d9730d", "#6b3504"])


def slots(outcome: Outcome) -> bytes:
    """Slots of every device by kind: stacked bars, darker for a higher rank, hatched where frozen, brown for int8."""
    devices = outcome.devices
    kinds = sorted({kind for device in devices for kind in device.slots}, key=kind_order)
    whole = outcome.experts * len(outcome.layers)
    places = np.arange(len(devices))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(7.4, 0.42 * len(devices) + 1.5), layout="constrained")
        left = np.zeros(len(devices))
        ranks = sorted({int(kind.split("/")[1]) for kind in kinds} - {0})
        for kind in kinds:
            format, rank = kind.split("/")[0], int(kind.split("/")[1])
            shade = 0.35 + 0.65 * (ranks.index(rank) + 1) / len(ranks) if rank else 0.08
            counts = np.array([device.slots.get(kind, 0) for device in devices])
            axes.barh(
                places,
                counts,
                left=left,
                height=0.62,
                color=(_WARM if format == "int8" else _SHADES)(shade),
                edgecolor="white" if rank else FAINT,
                hatch="" if rank else "////",
                label=f"{format}, rank {rank}" if rank else f"{format}, frozen",
            )
            for place, count, start in zip(places, counts, left, strict=True):
                if count >= 0.03 * whole:
                    axes.annotate(
                        str(count), (start + count / 2, place), ha="center", va="center",
                        fontsize=8.5, color="white" if shade > 0.6 else INK,
                    )  # fmt: skip
            left += counts
        axes.set_yticks(places, [f"{d.name}\n{d.profile}" for d in devices], fontsize=9)
        axes.invert_yaxis()
        axes.set(
            title=f"Slots for experts, of {whole} experts in {len(outcome.layers)} layers",
            xlim=(0, whole),
        )
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        if kinds:
            figure.legend(
                loc="outside lower center", ncols=min(4, len(kinds)), fontsize=8.5,
                handlelength=1.2, columnspacing=1.2,
            )  # fmt: skip
        return png(figure)


def experts(outcome: Outcome) -> bytes:
    """Experts x devices per layer: in how many rounds each device trained each expert; a ring where it only held it."""
    names = [device.name for device in outcome.devices]
    most = max(1, sum(r.work == "train" for r in outcome.rounds))
    columns = min(2, len(outcome.layers))
    rows = -(-len(outcome.layers) // columns)
    with plt.rc_context(STYLE):
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
            resident = np.stack([outcome.resident_rounds[name][index] for name in names])
            rows_of, columns_of = np.nonzero((resident > 0) & (held == 0))
            axes.scatter(columns_of, rows_of, marker="o", s=14, facecolor="none", edgecolor=MUTED)
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
            note = f", {nobody} by nobody" if nobody else ""
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
        return png(figure)
