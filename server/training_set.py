"""Which of the experts a device holds it trains and sends in one round: the most utility under a few caps. Pure.

Letters: N experts held, C caps (seconds of the round, bytes of uplink, ...).

A 0/1 knapsack with few caps. Lagrange prices of the caps give every expert a density, and no choice is worth more than
the linear relaxation at these prices. Experts are taken by falling density; a search with that bound then improves the
choice as long as its steps last. It ends by itself for a dozen experts, and with a choice within the `bound` reported
for any number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol.manifest import BaseIndex
from server.relevance import Floats

PRICE_ROUNDS = 200
STEPS = 20_000  # of the search; about 0.1 s
_EPS = 1e-9


class CapError(ValueError):
    """Costs or caps that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class TrainingSet:
    """The experts to train, by their place in the list of those held."""

    chosen: tuple[int, ...]  # rising
    value: float
    bound: float  # no choice is worth more


def utility(rows: Floats, mean_square_gradient: Floats) -> Floats:
    """What training an expert is worth: rows * sqrt(mean squared gradient), after Flux (arXiv 2508.19078).

    Parameters
    ----------
    rows : [...], rows (or tokens) that the device has for the expert
    mean_square_gradient : [...], of the expert's factors, >= 0

    Examples
    --------
    >>> utility(np.array([10.0, 40.0]), np.array([4.0, 0.25])).tolist()
    [20.0, 20.0]
    """
    return np.asarray(rows * np.sqrt(mean_square_gradient))


def choose(value: Floats, cost: Floats, caps: Floats, *, steps: int = STEPS) -> TrainingSet:
    """The most value within all caps.

    Parameters
    ----------
    value : [N]
        Experts worth nothing or less are left out.
    cost : [N, C], >= 0
    caps : [C], >= 0; infinity where there is none
    steps : int
        Of the search, at most. It decides the time and never breaks a cap.

    Raises
    ------
    CapError

    Examples
    --------
    Two of 3 MB fit 6 MB of uplink and take 20 s; of 15 s there is time for one of them and the short one.

    >>> v, c = np.array([5.0, 4.0, 2.0]), np.array([[3.0, 10.0], [3.0, 10.0], [3.0, 5.0]])
    >>> choose(v, c, np.array([6.0, 20.0])).chosen
    (0, 1)
    >>> choose(v, c, np.array([6.0, 15.0])).chosen
    (0, 2)
    """
    value, cost = np.asarray(value, np.float64), np.asarray(cost, np.float64)
    caps = np.asarray(caps, np.float64)
    if value.ndim != 1 or cost.shape != (len(value), len(caps)):
        raise CapError(f"value {value.shape}, cost {cost.shape}: [N] and [N, {len(caps)}] wanted")
    if not (np.isfinite(value).all() and np.isfinite(cost).all()) or np.isnan(caps).any():
        raise CapError("value or cost is not finite, or a cap is NaN")
    if (cost < 0).any() or (caps < 0).any():
        raise CapError("negative cost or cap")
    # In shares of the caps. What costs nothing of an empty cap is free there.
    share = np.divide(cost, caps, out=np.where(cost > 0, np.inf, 0.0), where=caps > 0)
    able = np.flatnonzero((value > 0) & (share <= 1 + _EPS).all(1))
    v, s = value[able], share[able]
    if (s.sum(0) <= 1 + _EPS).all():
        return TrainingSet(chosen=tuple(able.tolist()), value=float(v.sum()), bound=float(v.sum()))
    prices = _prices(v, s)
    weight = s @ prices
    density = np.divide(v, weight, out=np.full_like(v, np.inf), where=weight > 0)
    order = np.lexsort((-v, -density))
    taken, bound = _search(v[order], s[order], weight[order], float(prices.sum()), steps)
    chosen = able[order[taken]]
    best = float(value[chosen].sum())
    return TrainingSet(chosen=tuple(sorted(chosen.tolist())), value=best, bound=max(best, bound))


def within_uplink(
    able: Mapping[str, Sequence[int]],
    value: Floats,
    rank_of: Mapping[tuple[int, int], int],
    base: BaseIndex,
    cap: float,
    *,
    bytes_per_number: float = 4.0,
) -> dict[str, tuple[int, ...]]:
    """Those of a device's trainable experts whose update fits the uplink of a round.

    Parameters
    ----------
    able : layer -> experts in slots that can be trained, in slot order
    value : [L, E], of this device
    rank_of : (layer, expert) -> rank of its slot
    cap : bytes of factors and router rows; 0: no cap
    bytes_per_number : of the coding on the wire

    Returns
    -------
    As `able`, less what does not fit. The most valuable expert is trained whatever the cap says: a lease without any
    would be work for nothing.
    """
    places = [(layer, e) for layer, held in able.items() for e in held]
    if not cap or not places:
        return {layer: tuple(held) for layer, held in able.items()}
    position = {str(layer): i for i, layer in enumerate(base.moe_layers)}
    worth = np.array([value[position[layer], e] for layer, e in places])
    worth = worth - min(0.0, worth.min()) + 1e-6  # a redundant expert still gains by training
    sides = sum(sum(base.features(p)) for p in base.projections)
    numbers = np.array([rank_of[int(layer), e] * sides + base.hidden for layer, e in places])
    picked = choose(worth, numbers[:, None] * bytes_per_number, np.array([cap])).chosen
    kept = {places[i] for i in picked or (int(np.argmax(worth)),)}
    return {layer: tuple(e for e in held if (layer, e) in kept) for layer, held in able.items()}


def _prices(v: Floats, s: Floats) -> Floats:
    """Prices [C] >= 0 of the caps with about the least Lagrange bound, sum max(0, v - s p) + sum p."""
    prices = np.full(s.shape[1], v.sum() / max(s.sum(), 1e-12))
    best, least = prices, np.inf
    for turn in range(PRICE_ROUNDS):
        gain = v - s @ prices
        bound = np.maximum(gain, 0).sum() + prices.sum()
        if bound < least:
            best, least = prices, bound
        used = s[gain > 0].sum(0)
        # A cap used beyond what there is becomes dearer, one with room cheaper; smaller steps towards the end.
        prices = prices * np.exp((2.0 / (1 + turn / 10)) * np.clip(used - 1, -1, 1))
    return best


def _search(
    v: Floats, s: Floats, weight: Floats, room: float, steps: int
) -> tuple[NDArray[np.int64], float]:
    """Depth first over experts by falling density: with the next one first, then without it.

    Returns
    -------
    Places of the best choice found, and a bound on every choice: what is found when the search came to its end, the
    linear relaxation otherwise.
    """
    count = len(v)
    # One cap for all: at the prices, whatever fits the caps weighs no more than `room`.
    summed_v, summed_w = (
        np.concatenate([[0.0], v.cumsum()]),
        np.concatenate([[0.0], weight.cumsum()]),
    )
    values, costs = v.tolist(), [tuple(row) for row in s.tolist()]

    def most(first: int, left: float) -> float:
        """What experts from place `first` on can add, parts of experts allowed."""
        goal = summed_w[first] + left
        last = int(np.searchsorted(summed_w, goal, "right")) - 1
        whole = float(summed_v[last] - summed_v[first])
        if last >= count:
            return whole
        return whole + float(values[last] * (goal - summed_w[last]) / weight[last])

    root = most(0, room)
    best, best_taken = -1.0, tuple[int, ...]()
    # (place, used, value, taken): the last one is looked at next.
    stack: list[tuple[int, tuple[float, ...], float, tuple[int, ...]]] = [
        (0, (0.0,) * s.shape[1], 0.0, ())
    ]
    while stack and steps > 0:
        steps -= 1
        place, used, worth, taken = stack.pop()
        if worth > best:
            best, best_taken = worth, taken
        if place == count:
            continue
        left = room - float(weight[list(taken)].sum()) if taken else room
        if worth + most(place, left) <= best * (1 + 1e-12):
            continue
        stack.append((place + 1, used, worth, taken))
        after = tuple(a + b for a, b in zip(used, costs[place], strict=True))
        if all(a <= 1 + _EPS for a in after):
            stack.append((place + 1, after, worth + values[place], (*taken, place)))
    return np.array(best_taken, np.int64), best if not stack else root
