"""FedMoE's first stage: the largest share of every layer's activations that fits a budget. Pure. arXiv 2408.11304.

Letters: L MoE layers, E experts per layer, p an expert's share of its layer, theta the share that every layer keeps.

For one theta the smallest sub-MoE takes each layer's experts by falling p until their sum reaches theta. What that
costs never falls as theta grows, so the largest theta that fits is found by halving, and it only needs to be sought
among the sums themselves: the answer is exact. It protects the worst layer, so layers keep different numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from server.relevance import Floats, shares


class ThresholdError(ValueError):
    """Not even the fewest experts allowed fit, or shares that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """What a layer keeps, and what that comes to."""

    theta: float  # least share of a layer's p that is kept, of those asked for; the layers keep this or more
    experts: tuple[tuple[int, ...], ...]  # per layer, by falling p
    cost: float


def smallest(p: Floats, theta: float, *, least: int) -> tuple[tuple[int, ...], ...]:
    """Per layer, the shortest prefix by falling p whose sum reaches theta; `least` experts or more.

    Parameters
    ----------
    p : [L, E], >= 0
    theta : in [0, 1]

    Examples
    --------
    >>> smallest(np.array([[0.1, 0.6, 0.3], [0.4, 0.3, 0.3]]), 0.6, least=1)
    ((1,), (0, 1))
    """
    order, reached = _sorted(p)
    counts = _counts(reached, theta, least)
    return tuple(tuple(int(e) for e in row[:n]) for row, n in zip(order, counts, strict=True))


def widest(
    p: Floats,
    cost: Floats,
    budget: float,
    *,
    top_k: int,
    alpha: float = 1.0,
    most: NDArray[np.int64] | None = None,
) -> Kept:
    """The sub-MoE of the largest theta that costs at most alpha * budget.

    Parameters
    ----------
    p : [L, E], >= 0
        Normalised per layer here; a layer without any is taken as uniform.
    cost : [L, E], >= 0
        Bytes of each expert (dense part not included), or ones for a budget in experts.
    budget : in the units of `cost`
    top_k : int
        Every layer keeps so many or more, whatever theta is.
    alpha : in (0, 1]
        The rest of the budget is head-room for experts that are added later.
    most : [L], optional
        At most so many experts of each layer.

    Raises
    ------
    ThresholdError

    Examples
    --------
    >>> p = np.array([[0.625, 0.25, 0.125], [0.5, 0.25, 0.25]])
    >>> widest(p, np.ones((2, 3)), 4, top_k=1)
    Kept(theta=0.75, experts=((0, 1), (0, 1)), cost=4.0)
    >>> widest(p, np.ones((2, 3)), 4, top_k=1, alpha=0.75)
    Kept(theta=0.625, experts=((0,), (0, 1)), cost=3.0)
    """
    p, cost = np.asarray(p, np.float64), np.asarray(cost, np.float64)
    layers, experts = p.shape
    if cost.shape != p.shape or not np.isfinite(p).all() or (p < 0).any() or (cost < 0).any():
        raise ThresholdError("finite p and cost of the same shape wanted, neither negative")
    if not 0 < alpha <= 1:
        raise ThresholdError(f"alpha {alpha} found, above 0 to 1 wanted")
    room = np.full(layers, experts) if most is None else np.minimum(most, experts)
    least = min(top_k, experts)
    if (room < least).any():
        layer = int(np.argmin(room))
        raise ThresholdError(f"layer position {layer}: room for {room[layer]} experts, top-{top_k}")
    order, reached = _sorted(shares(p))
    # [L, E + 1]: what the first n experts of a layer cost
    summed = np.cumsum(np.take_along_axis(cost, order, 1), 1)
    paid = np.concatenate([np.zeros((layers, 1)), summed], 1)

    def fits(theta: float) -> bool:
        counts = _counts(reached, theta, least)
        return bool((counts <= room).all() and _price(paid, counts) <= alpha * budget)

    if not fits(0.0):
        wanted = _price(paid, _counts(reached, 0.0, least))
        raise ThresholdError(
            f"{least} experts in each layer cost {wanted:g}, {alpha * budget:g} there is"
        )
    thetas = np.unique(reached)
    low, high = -1, len(thetas)  # the first is as good as 0, the last is never tried
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(thetas[middle]) else (low, middle)
    theta = float(thetas[low]) if low >= 0 else 0.0
    counts = _counts(reached, theta, least)
    kept = tuple(tuple(int(e) for e in row[:n]) for row, n in zip(order, counts, strict=True))
    return Kept(theta=theta, experts=kept, cost=_price(paid, counts))


def _sorted(p: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Experts of each layer by falling p, and the share that each prefix reaches."""
    order = np.argsort(-p, axis=1, kind="stable")
    reached = np.cumsum(np.take_along_axis(p, order, 1), 1)
    # A sum that falls short of 1 by rounding must not make a layer unable to reach it.
    reached[:, -1] = np.maximum(reached[:, -1], 1.0)
    return order, np.minimum(reached, 1.0)


def _counts(reached: Floats, theta: float, least: int) -> NDArray[np.int64]:
    return np.asarray(np.maximum((reached < theta).sum(1) + 1, least), np.int64)


def _price(paid: Floats, counts: NDArray[np.int64]) -> float:
    return float(paid[np.arange(len(paid)), counts].sum())
