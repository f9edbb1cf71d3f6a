"""The picture in the model card."""

from __future__ import annotations

import os
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray


def heat_maps(mass: NDArray[np.float64], domains: list[str], path: Path) -> None:
    """One heat-map per layer of mean router probability, domains [D] by experts [E]; `mass` is [D, L, E]."""
    count, layers, experts = mass.shape
    figure, axes = plt.subplots(
        layers, 1, figsize=(9, 0.5 + layers * (0.3 * count + 0.55)), sharex=True, squeeze=False
    )
    image = None
    for layer, axis in enumerate(axes[:, 0]):
        image = axis.imshow(
            100 * mass[:, layer], aspect="auto", cmap="magma", vmin=0, vmax=100 * mass.max()
        )
        axis.set_title(f"layer {layer}", loc="left", fontsize=10)
        axis.set_yticks(range(count), domains, fontsize=9)
        for row in range(count):
            for column in range(experts):
                value = 100 * mass[row, layer, column]
                color = "black" if value > 60 * mass.max() else "white"
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", fontsize=7, color=color
                )
    axes[-1, 0].set_xticks(range(experts))
    axes[-1, 0].set_xlabel("expert")
    figure.colorbar(image, ax=list(axes[:, 0]), label="mean router probability, %", pad=0.02)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=130, bbox_inches="tight", format="png", metadata={"Software": None})
    plt.close(figure)
    os.replace(part, path)
