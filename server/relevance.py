"""How much an expert's choice says about a device's answers: estimators of I(Z;Y) from its statistics. Pure.

Letters: L MoE layers, E experts per layer, N tokens of a layer (an encoder's and a decoder's differ), g the full
router's probability, Z the expert of a token, X the token, Y its answer.

All take the statistics of `protocol.update.STATS` by name. What is measured at the experts themselves (output norm,
Taylor) is known for resident experts only. There, the residents as a whole count as much as their routed mass, and the
measurement says how that is spread among them; an expert that is not resident counts as its own routed mass. So a
device neither clings to what it holds nor drops it for what it never saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Stats = Mapping[str, NDArray[np.floating]]
LAM = 0.5  # weight of the general against the specific
NORM_RANGE = (
    4.0  # an output norm counts as at most this many times its layer's mean, or that part of it
)


class StatsError(ValueError):
    """A statistic that an estimator needs and that is not there."""


def stat(stats: Stats, name: str, wanted_by: str) -> Floats:
    """One statistic as float64 [L, E]; raises StatsError when it is missing or not a matrix."""
    if name not in stats:
        found = ", ".join(sorted(stats)) or "none"
        raise StatsError(f"{wanted_by} needs the statistic '{name}', found: {found}")
    array = np.asarray(stats[name], np.float64)
    if array.ndim != 2:
        raise StatsError(f"statistic '{name}': {array.ndim} dimensions found, [L, E] wanted")
    return array


def shares(x: Floats) -> Floats:
    """Every row [E] divided by its sum; a row without a positive sum is uniform.

    >>> shares(np.array([[3.0, 1.0], [0.0, 0.0]])).tolist()
    [[0.75, 0.25], [0.5, 0.5]]
    """
    total = x.sum(-1, keepdims=True)
    return np.asarray(np.divide(x, total, out=np.full_like(x, 1 / x.shape[-1]), where=total > 0))


def per_token(sums: Floats, mass: Floats) -> Floats:
    """Sums [L, E] over the tokens of each layer -> means; g sums to 1 per token, so `mass` [L, E] counts them.

    >>> per_token(np.array([[2.0, 1.0]]), np.array([[3.0, 1.0]])).tolist()
    [[0.5, 0.25]]
    """
    return np.asarray(sums / np.maximum(mass.sum(-1, keepdims=True), 1e-12))


# Scores from the router alone


def activation_frequency(activations: Floats) -> Floats:
    """FedMoE's p = n / N (arXiv 2408.11304): share of the layer's activations that went to the expert.

    Parameters
    ----------
    activations : [L, E]
        Tokens n that have the expert in their top-k, or their routed mass. With top-1, a row of counts sums to N.

    Returns
    -------
    [L, E], rows sum to 1

    Examples
    --------
    >>> activation_frequency(np.array([[6.0, 2.0, 0.0]])).tolist()
    [[0.75, 0.25, 0.0]]
    """
    return shares(activations)


def cumulative(mass: Floats) -> Floats:
    """Generality, mean g over the tokens: HFedMoE (arXiv 2601.00583) eq. 3, [L, E].

    >>> cumulative(np.array([[3.0, 1.0]])).tolist()
    [[0.75, 0.25]]
    """
    return per_token(mass, mass)


def specific(peak: Floats) -> Floats:
    """Peak relevance for rare tokens, max g over a batch: HFedMoE eq. 4, [L, E] in [0, 1].

    `peak` is that maximum already, averaged over batches by the device. It grows with the batch size and saturates with
    a confident router; the statistic "high", a quantile, does not.
    """
    return np.clip(peak, 0.0, 1.0)


def blend(general: Floats, special: Floats, lam: float = LAM) -> Floats:
    """HFedMoE eq. 5: lam * general + (1 - lam) * special.

    >>> blend(np.array([[0.75, 0.25]]), np.array([[0.8, 0.9]]), 0.5).round(3).tolist()
    [[0.775, 0.575]]
    """
    return lam * general + (1 - lam) * special


# Estimators by name


def by_frequency(stats: Stats, lam: float = LAM) -> Floats:
    """FedMoE: `activation_frequency` of the routed mass. `lam` is not used."""
    return activation_frequency(stat(stats, "top", "relevance 'frequency'"))


def by_mass(stats: Stats, lam: float = LAM) -> Floats:
    """Routed mass per token, plus (1 - lam) times a high quantile of g in place of HFedMoE's maximum.

    >>> s = {"mass": [[3.0, 1.0]], "top": [[2.8, 0.4]], "high": [[0.9, 0.6]]}
    >>> by_mass(s, 0.5).round(3).tolist()
    [[1.15, 0.4]]
    """
    who = "relevance 'mass'"
    routed = per_token(stat(stats, "top", who), stat(stats, "mass", who))
    return routed + (1 - lam) * stat(stats, "high", who) if lam < 1 else routed


def by_norm(stats: Stats, lam: float = LAM) -> Floats:
    """Routed mass times mean output norm, after REAP (arXiv 2510.13999). `lam` is not used.

    A norm counts as at most NORM_RANGE times its layer's mean, which stands in where it is unknown (not resident).

    >>> by_norm({"top": [[2.0, 2.0, 2.0]], "output_norm": [[2.0, 6.0, 0.0]]}).tolist()
    [[1.0, 3.0, 2.0]]
    """
    top, output_norm = (stat(stats, name, "relevance 'norm'") for name in ("top", "output_norm"))
    known = (output_norm > 0) & (top > 0)
    ratio = np.divide(_scaled(output_norm, top, known), top, out=np.ones_like(top), where=known)
    return np.asarray(top * np.clip(ratio, 1 / NORM_RANGE, NORM_RANGE))


def by_taylor(stats: Stats, lam: float = LAM) -> Floats:
    """First-order change of the loss if the expert were removed, in units of routed mass. `lam` is not used.

    First order: it ranks, its size is not to be trusted.

    >>> by_taylor({"top": [[2.0, 2.0, 2.0]], "taylor": [[0.1, 0.3, 0.0]]}).round(6).tolist()
    [[1.0, 3.0, 2.0]]
    """
    top, taylor = (stat(stats, name, "relevance 'taylor'") for name in ("top", "taylor"))
    return _scaled(taylor, top, taylor > 0)


def by_labels(stats: Stats, lam: float = LAM) -> Floats:
    """Share of each expert in I(Z;Y), in nats, from the device's soft counts per label. `lam` is not used.

    A layer without any such information (no labels, or fewer rows than the bias correction asks for) counts by its
    routed mass.

    >>> by_labels({"top": [[3.0, 1.0], [3.0, 1.0]], "label_information": [[0.0, 0.2], [0, 0]]}).tolist()
    [[0.0, 0.2], [3.0, 1.0]]
    """
    who = "relevance 'labels'"
    known = np.maximum(stat(stats, "label_information", who), 0.0)
    return np.where(known.sum(-1, keepdims=True) > 0, known, stat(stats, "top", who))


def by_hfedmoe(stats: Stats, lam: float = LAM) -> Floats:
    """HFedMoE's blend s_b, eq. 5, of eqs. 3 and 4."""
    mass, peak = (stat(stats, name, "relevance 'hfedmoe'") for name in ("mass", "peak"))
    return blend(cumulative(mass), specific(peak), lam)


def _scaled(measured: Floats, top: Floats, known: NDArray[np.bool_]) -> Floats:
    """`measured` where known, so that the known ones sum to their routed mass in every layer; `top` elsewhere."""
    whole = (measured * known).sum(-1, keepdims=True)
    held = (top * known).sum(-1, keepdims=True)
    usable = known & (whole > 0) & (held > 0)
    unit = np.divide(held, whole, out=np.ones_like(whole), where=whole > 0)
    return np.asarray(np.where(usable, measured * unit, top))


Estimator = Callable[[Stats, float], Floats]
RELEVANCE: dict[str, Estimator] = {
    "frequency": by_frequency,
    "hfedmoe": by_hfedmoe,
    "labels": by_labels,
    "mass": by_mass,
    "norm": by_norm,
    "taylor": by_taylor,
}


def leave_one_out(without: Floats, full: float) -> Floats:
    """The oracle: what the loss of a fixed batch rises by without each expert, [L, E].

    Needs one pass per expert over the whole model, so it is for simulations and tests. Negative where the batch is
    better off without the expert.

    Parameters
    ----------
    without : [L, E], loss with that one expert removed
    full : loss of the whole model on the same batch

    Examples
    --------
    >>> leave_one_out(np.array([[2.5, 1.75]]), 2.0).tolist()
    [[0.5, -0.25]]
    """
    return np.asarray(without, np.float64) - full
