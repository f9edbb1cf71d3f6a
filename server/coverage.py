"""Who was trained how much lately: what keeps experts from starving when few devices take part in a round. Pure.

Letters: L MoE layers, E experts per layer.

Relevance serves the device that asks; coverage serves the model of all. With 5 of 30 devices in a round, to count the
holders of that round alone gives the same experts to the next five. So training is counted over rounds, fading: one
unit is what an average expert gets from one device in one round. `choose_experts` gives the slots for coverage to the
experts with the least of it (the historical deficit of FLEX-MoE, arXiv 2512.23070, without its linear programme).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.relevance import Floats

DECAY = 0.9  # of a round: half of it is gone after 6.6
RANGE = 4.0  # a device's training counts as at most so many units, and at least that part of one


def faded(
    former: Floats | None, tokens: Sequence[NDArray[np.floating]], decay: float = DECAY
) -> Floats:
    """Trained mass after one more round.

    Parameters
    ----------
    former : [L, E], before the round; None before the first
    tokens : of every update, [L, E]
        Tokens that gave each expert a gradient. One without tokens was not trained. That some is counted in any case
        keeps an expert that no router likes from taking every slot for coverage.
    decay : in [0, 1]

    Returns
    -------
    [L, E], >= 0

    Examples
    --------
    Three experts trained by two devices: 40 tokens on average are one unit.

    >>> faded(None, [np.array([[60.0, 30.0, 0.0]]), np.array([[0.0, 30.0, 0.0]])]).tolist()
    [[1.5, 1.5, 0.0]]
    >>> faded(np.array([[1.0, 0.0]]), [np.array([[0.0, 8.0]])], decay=0.5).tolist()
    [[0.5, 1.0]]
    """
    if not tokens:
        if former is None:
            raise ValueError("neither a former mass nor an update: the shape [L, E] is unknown")
        return decay * former
    found = np.stack([np.asarray(t, np.float64) for t in tokens])
    trained = found > 0
    unit = found.sum((0, 2)) / np.maximum(trained.sum((0, 2)), 1)  # [L]
    units = found / np.maximum(unit, 1e-12)[None, :, None]
    new = np.where(trained, np.clip(units, 1 / RANGE, RANGE), 0.0).sum(0)
    return np.asarray(new if former is None else decay * former + new)


def coverage_cv(mass: Floats) -> float:
    """Coefficient of variation of trained mass over the experts of a layer, mean of the layers; 0 is even.

    Layers that nobody trained are left out; 0 when there is none but these.

    Parameters
    ----------
    mass : [L, E], >= 0
        Trained tokens or counts, of a round or of a run.

    Examples
    --------
    >>> coverage_cv(np.array([[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]))
    0.5
    """
    mass = np.asarray(mass, np.float64)
    mean = mass.mean(-1)
    there = mean > 0
    return float((mass.std(-1)[there] / mean[there]).mean()) if there.any() else 0.0


def never_trained(mass: Floats) -> int:
    """How many (layer, expert) nobody has trained.

    >>> never_trained(np.array([[2.0, 0.0], [1.0, 1.0]]))
    1
    """
    return int((np.asarray(mass) <= 0).sum())
