"""Statistics of the router over all experts, resident or not, as the slow references measure them.

Letters: T tokens, E experts.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def full_router(
    g: torch.Tensor, valid: torch.Tensor, top_k: int, resident: tuple[int, ...]
) -> dict[str, Any]:
    """The fields of `LayerStats` that follow from the full router's distribution, [T, E], over a batch's tokens."""
    top = torch.zeros_like(g).scatter(1, g.topk(top_k, -1).indices, 1.0) * g
    sums = {"mass": g, "top": top, "g_log_g": torch.xlogy(g, g)}
    found: dict[str, Any] = {n: (v * valid[:, None]).sum(0).numpy() for n, v in sums.items()}
    found["missed"] = float(((1 - g[:, list(resident)].sum(-1)) * valid).sum())
    ordered = (g * valid[:, None]).sort(0, descending=True).values
    found["peak"] = ordered[0].numpy()
    found["high"] = ordered[math.ceil(len(g) / 100) - 1].numpy()
    return found
