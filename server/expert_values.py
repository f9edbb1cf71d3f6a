"""What an expert is worth to a device: an information-bottleneck score from its routing statistics. Pure.

Letters: L MoE layers, E experts per layer, N tokens of a layer (an encoder's and a decoder's differ).

An expert's value for a device is its share of the relevance I(Z;Y), by one of the estimators in `relevance`, less
`beta` times its share of the redundancy I(X;Z). `red_e = mean g ln g - p ln p` with `p = mean g` is the exact share of
expert e: it is never negative and sums to I(X;Z). Values are smoothed over rounds; experts rarely trained get an
exploration bonus. `strategies` fills the slots by these values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from server.relevance import LAM, RELEVANCE, Stats, StatsError, leave_one_out, shares, stat

Floats = NDArray[np.float64]
RHO = 0.7  # share of the former value in the moving average


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


def hfedmoe_score(stats: Stats, beta: float, lam: float = LAM) -> Floats:
    """HFedMoE's I_b = s_b - beta * KL as printed, arXiv 2601.00583 eqs. 11 and 14, [L, E].

    KL_e = mean g ln(g / mean g) is the redundancy of `redundancy`; s_b and KL have different units, and the balance
    between them differs from layer to layer.
    """
    mass, g_log_g = (stat(stats, name, "relevance 'hfedmoe'") for name in ("mass", "g_log_g"))
    return RELEVANCE["hfedmoe"](stats, lam) - beta * redundancy(mass, g_log_g)


def values(stats: Stats, beta: float, relevance: str = "norm", lam: float = LAM) -> Floats:
    """Value of every expert for one device.

    Parameters
    ----------
    stats : name -> [L, E], as in `protocol.update.STATS`
    beta : weight of redundancy; 0 for FedMoE, which has none
    relevance : a name in `relevance.RELEVANCE`
    lam : weight of the general against the specific, where the estimator has both

    Returns
    -------
    [L, E] in shares of a layer: relevance sums to 1 per layer. "hfedmoe" ranks the experts of a layer exactly as
    printed, divided by the layer's sum of s_b so that margins and bonuses mean the same as elsewhere.

    Raises
    ------
    StatsError
        Unknown estimator, or a statistic that it needs is missing.

    Examples
    --------
    >>> s = {"mass": [[3.0, 1.0]], "top": [[3.0, 1.0]], "g_log_g": [[-1.0, -1.0]]}
    >>> values(s, beta=0.0, relevance="frequency").tolist()
    [[0.75, 0.25]]
    """
    if relevance not in RELEVANCE:
        raise StatsError(f"relevance '{relevance}' found, one of {', '.join(RELEVANCE)} wanted")
    if relevance == "hfedmoe":
        whole = RELEVANCE["hfedmoe"](stats, lam).sum(-1, keepdims=True)
        return np.asarray(hfedmoe_score(stats, beta, lam) / np.maximum(whole, 1e-12))
    value = shares(RELEVANCE[relevance](stats, lam))
    if beta:
        mass, g_log_g = (stat(stats, name, "redundancy") for name in ("mass", "g_log_g"))
        value = value - beta * shares(redundancy(mass, g_log_g))
    return value


def oracle_values(without: Floats, full: float) -> Floats:
    """Values by `relevance.leave_one_out`, [L, E]; experts that do harm are worth nothing.

    >>> oracle_values(np.array([[2.5, 1.75, 3.5]]), 2.0).tolist()
    [[0.25, 0.0, 0.75]]
    """
    return shares(np.maximum(leave_one_out(without, full), 0.0))


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
