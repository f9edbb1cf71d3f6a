"""What a device's routing statistics may give away: a row of text counts only so much, and noise hides the rest. Pure.

Per-token expert choices reveal most of a text (arXiv 2602.04105: 91% of tokens recovered); so what leaves a device is
one [L, E] matrix per statistic, summed over all its rows. With a clip of c, a row counts as at most c tokens: its share
of statistic s in a layer is scaled down to an L1 norm of at most c * b_s, b_s being the most one token can give. So
removing a row (its sums become 0, all else stays) changes s by at most

    c * b_s * sqrt(L)    in the L2 norm over all layers,

and Gaussian noise of `noise` times that on every entry is a Gaussian mechanism of that noise multiplier for s (Dwork
and Roth 2014, A.1); with S statistics sent together the multiplier of the whole is noise / sqrt(S). Rows are
protected, not devices; how many rows there are, and the accuracy and loss on held-back rows, are sent as they are.
Floating-point Gaussians leak in their last bits (Mironov 2012): this is not hardened against that.

Letters: R rows of text, L MoE layers, E experts, d hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
FloatArrays = dict[str, NDArray[np.float32]]


def bounds(experts: int, hidden: int) -> dict[str, float]:
    """b_s of each statistic that is a sum over tokens.

    Probabilities sum to 1, -g ln g to at most ln E. An output's norm has no bound of its own: sqrt(d), what a
    normalised hidden state has, is the cut, chosen without looking at data.

    >>> {name: round(b, 3) for name, b in bounds(4, 16).items()}
    {'mass': 1.0, 'top': 1.0, 'g_log_g': 1.386, 'output_norm': 4.0}
    """
    return {"mass": 1.0, "top": 1.0, "g_log_g": math.log(experts), "output_norm": hidden**0.5}


def clipped_sum(rows: NDArray[np.floating], most: float) -> Floats:
    """Sum over rows, each scaled down to an L1 norm of at most `most`; 0: none is.

    Parameters
    ----------
    rows : [R, E], what each row of text gives
    most : c * b_s

    Returns
    -------
    [E]

    Examples
    --------
    >>> clipped_sum(np.array([[6.0, 2.0], [1.0, 0.0]]), 4.0)
    array([4., 1.])
    >>> clipped_sum(np.array([[6.0, 2.0], [1.0, 0.0]]), 0.0)
    array([7., 2.])
    """
    values = np.asarray(rows, np.float64)
    if most:
        size = np.abs(values).sum(-1, keepdims=True)
        values = values * np.minimum(1.0, most / np.maximum(size, 1e-300))
    summed: Floats = values.sum(0)
    return summed


def sensitivity(clip: float, layers: int, experts: int, hidden: int) -> dict[str, float]:
    """The most that removing one row changes each statistic [L, E], in the L2 norm.

    >>> sensitivity(10.0, 4, 2, 9)["output_norm"]
    60.0
    """
    return {
        name: clip * bound * math.sqrt(layers) for name, bound in bounds(experts, hidden).items()
    }


def check(clip: float, noise: float) -> None:
    """Raise ValueError for noise without a clip: what a row can change would have no bound."""
    if noise and clip <= 0:
        raise ValueError(f"noise of {noise} on sums that are not clipped hides nothing")


def noised(
    stats: Mapping[str, NDArray[np.float32]],
    clip: float,
    noise: float,
    hidden: int,
    rng: np.random.Generator,
) -> FloatArrays:
    """Statistics with Gaussian noise, brought back into the range that they have without; nothing at `noise` 0.

    Parameters
    ----------
    stats : name -> [L, E], clipped sums
    clip : c, more than 0
    noise : standard deviation in units of the sensitivity
    hidden : d
    rng : the device's own, seeded with what nobody else knows

    Returns
    -------
    The same names. A statistic that is no sum over rows has no sensitivity here: it is 0, so that it says nothing.

    Raises
    ------
    ValueError
        Noise without a clip.
    """
    check(clip, noise)
    if not noise:
        return dict(stats)
    layers, experts = next(iter(stats.values())).shape
    widths = sensitivity(clip, layers, experts, hidden)
    hidden_stats: FloatArrays = {}
    for name, value in stats.items():
        if name not in widths:
            hidden_stats[name] = np.zeros_like(value)
            continue
        found = value + rng.normal(0.0, noise * widths[name], value.shape)
        found = np.minimum(found, 0) if name == "g_log_g" else np.maximum(found, 0)
        hidden_stats[name] = found.astype(np.float32)
    return hidden_stats
