"""What an expert is worth to a device: an information-bottleneck score from its routing statistics. Pure.

Letters: L MoE layers, E experts per layer, N tokens of a layer (an encoder's and a decoder's differ).

An expert's value for a device is its share of the relevance I(Z;Y), estimated by routed mass times output norm, less
`beta` times its share of the redundancy I(X;Z). `red_e = mean g ln g - p ln p` with `p = mean g` is the exact share of
expert e: it is never negative and sums to I(X;Z). Values are smoothed over rounds; experts rarely trained get an
exploration bonus. `choose_experts` fills the slots by these values.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
RHO = 0.7  # share of the former value in the moving average
NORM_RANGE = (
    4.0  # an output norm counts as at most this many times its layer's mean, or that part of it
)


def redundancy(mass: Floats, g_log_g: Floats) -> Floats:
    """Share of each expert in I(X;Z), in nats.

    Parameters
    ----------
    mass : [L, E], sum over tokens of the full router's probability g; a row sums to N
    g_log_g : [L, E], sum over tokens of g ln g

    Returns
    -------
    [L, E], not negative; a row sums to I(X;Z) of that layer

    Examples
    --------
    Two tokens, each sent to its own expert with certainty: I(X;Z) = ln 2, half of it each.

    >>> redundancy(np.array([[1.0, 1.0]]), np.zeros((1, 2))).round(4).tolist()
    [[0.3466, 0.3466]]
    """
    tokens = np.maximum(mass.sum(-1, keepdims=True), 1e-12)
    p = mass / tokens
    with np.errstate(divide="ignore", invalid="ignore"):
        p_log_p = np.where(p > 0, p * np.log(p), 0.0)
    return np.asarray(np.maximum(g_log_g / tokens - p_log_p, 0.0))


def relevance(top: Floats, output_norm: Floats) -> Floats:
    """Routed mass times mean output norm; where the norm is unknown (not resident) the layer's mean stands in.

    Parameters
    ----------
    top : [L, E], probability mass on tokens that have the expert in their top-k
    output_norm : [L, E], sum of routed weight times norm of the expert's output, 0 where not resident

    Examples
    --------
    >>> relevance(np.array([[2.0, 2.0, 2.0]]), np.array([[2.0, 6.0, 0.0]])).tolist()
    [[1.0, 3.0, 2.0]]
    """
    known = (output_norm > 0) & (top > 0)
    norm = np.divide(output_norm, top, out=np.zeros_like(top), where=known)
    held = (top * known).sum(-1, keepdims=True)
    mean = (output_norm * known).sum(-1, keepdims=True) / np.maximum(held, 1e-12)
    ratio = np.divide(norm, mean, out=np.ones_like(norm), where=known & (mean > 0))
    return np.asarray(top * np.clip(ratio, 1 / NORM_RANGE, NORM_RANGE))


def values(stats: Mapping[str, NDArray[np.float32]], beta: float) -> Floats:
    """Value of every expert for one device, [L, E]; `stats` as in `protocol.update.STATS`."""
    wide = {name: np.asarray(stats[name], np.float64) for name in ("mass", "top", "g_log_g")}
    rel = relevance(wide["top"], np.asarray(stats["output_norm"], np.float64))
    red = redundancy(wide["mass"], wide["g_log_g"])
    return _shares(rel) - beta * _shares(red)


def _shares(x: Floats) -> Floats:
    total = x.sum(-1, keepdims=True)
    return np.asarray(np.divide(x, total, out=np.full_like(x, 1 / x.shape[-1]), where=total > 0))


def smooth(former: Floats | None, new: Floats) -> Floats:
    """Moving average over rounds.

    >>> smooth(np.zeros(1), np.ones(1)).round(3).tolist()
    [0.3]
    """
    return new if former is None else RHO * former + (1 - RHO) * new


def exploration_bonus(trained_count: NDArray[np.int64], round: int, strength: float) -> Floats:
    """Upper-confidence bonus in units of a uniform share, [L, E].

    Parameters
    ----------
    trained_count : [L, E], updates that trained the expert so far
    """
    uniform = 1 / trained_count.shape[-1]
    return np.asarray(
        strength * uniform * np.sqrt(np.log(max(round, 1)) / (1.0 + trained_count)), np.float64
    )
