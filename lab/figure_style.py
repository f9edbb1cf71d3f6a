"""How the report's figures look, and how they become PNG bytes."""

from __future__ import annotations

import io
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.figure import Figure

INK, MUTED, FAINT, GRID = "#1f2933", "#616e7c", "#b8c2cc", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#1f6feb", "#d9730d", "#2f9e44", "#c92a2a"
STYLE: Any = {
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


def png(figure: Figure) -> bytes:
    """The figure as bytes; it is closed."""
    buffer = io.BytesIO()
    # Without the date and the software's version the same run gives the same bytes.
    figure.savefig(buffer, format="png", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()
