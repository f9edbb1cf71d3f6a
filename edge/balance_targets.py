"""What share of the routing each resident expert should get on this device: the target of the balance term. Pure.

Letters: L MoE layers, E experts, P residents of a layer, C labels.

FFT-MoE (arXiv 2508.18663) asks for balance that knows how uneven a device's data is; its formula is not public in the
sources at hand, so this is a reconstruction. Equal load is right for a device with all kinds of data and wrong for one
with a single kind, whose experts would be forced away from what they are for:

    target = w * uniform + (1 - w) * ((1 - mix) * shares + mix * wish)

w       entropy of the device's labels over log C: 1 for all labels alike (and without labels), 0 for a single one
shares  where its tokens go now: measured before training, then a moving average of the routed tokens
wish    softmax(-kappa log(1 + n)), n how often the fleet has trained an expert: the rarely trained ones first
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edge.session import Resident

KEEP = 0.9
"""Of the moving average, each step: a lease of ten steps replaces two thirds of it."""
Floats = NDArray[np.float64]


def evenness(labels: Iterable[str | None], count: int) -> float:
    """Entropy of the labels over log C, in [0, 1].

    Parameters
    ----------
    labels : of the device's training rows
    count : C, the labels of the task; below 2 there is nothing to be uneven about

    Examples
    --------
    >>> evenness(["a", "a", "b", "b"], 4), evenness(["a", "a"], 4), evenness([None], 0)
    (0.5, 0.0, 1.0)
    """
    if count < 2:
        return 1.0
    rows = list(labels)
    shares = [rows.count(label) / len(rows) for label in sorted({str(label) for label in rows})]
    entropy = sum(p * math.log(1 / p) for p in shares)
    return min(1.0, entropy / math.log(count))


def wish(trained: NDArray[np.floating], kappa: float) -> Floats:
    """softmax(-kappa log(1 + n)) of the counts n of some experts.

    >>> wish(np.array([0.0, 1.0]), 1.0).round(3).tolist()
    [0.667, 0.333]
    """
    # In logarithms: (1 + n)^-kappa underflows for large kappa.
    logs = -kappa * np.log1p(np.asarray(trained, np.float64))
    weights = np.exp(logs - logs.max())
    return np.asarray(weights / weights.sum())


def target(shares: Floats, wished: Floats | None, w: float, mix: float) -> Floats:
    """The target over P residents, sums to 1; without a wish `mix` counts as 0.

    >>> target(np.array([0.8, 0.2]), np.array([0.0, 1.0]), w=0.5, mix=0.5).tolist()
    [0.45, 0.55]
    """
    uniform = np.full(len(shares), 1 / len(shares))
    skewed = shares if wished is None else (1 - mix) * shares + mix * wished
    mixed = w * uniform + (1 - w) * skewed
    return np.asarray(mixed / mixed.sum())


class Targets:
    """The targets of a lease, which follow the routing from step to step.

    Parameters
    ----------
    resident : MoE layer -> expert ids in slot order
    shares : MoE layer -> [P], where tokens went before training; sums to 1
    w : `evenness`
    trained_counts : [L, E] from the server, None when it sent none
    mix, kappa : of `protocol.objective.Objective`
    """

    def __init__(
        self,
        resident: Resident,
        shares: Mapping[int, Floats],
        w: float,
        trained_counts: NDArray[np.floating] | None,
        mix: float,
        kappa: float,
    ) -> None:
        self._w, self._mix = w, mix
        self._shares = dict(shares)
        self._wished: dict[int, Floats] = {}
        if trained_counts is not None:
            for row, (layer, held) in enumerate(resident.items()):
                self._wished[layer] = wish(np.maximum(trained_counts[row, list(held)], 0), kappa)

    def now(self) -> dict[int, NDArray[np.float32]]:
        """MoE layer -> float32 [P]."""
        return {
            layer: target(shares, self._wished.get(layer), self._w, self._mix).astype(np.float32)
            for layer, shares in self._shares.items()
        }

    def follow(self, routed: Mapping[int, NDArray[np.float32] | Sequence[float]]) -> None:
        """Move the shares towards the routed tokens per slot of a step."""
        for layer, tokens in routed.items():
            counts = np.asarray(tokens, np.float64)
            if layer in self._shares and (total := counts.sum()) > 0:
                self._shares[layer] = KEEP * self._shares[layer] + (1 - KEEP) * counts / total
