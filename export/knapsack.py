"""The multiple-choice knapsack of the planner (pure): one state for every item, under several caps.

Letters: N items, J states, C caps. An item is an expert of a layer; a state is absent, or a format and a rank.

Multiplicative weights find prices of the caps, and with them a bound that no choice exceeds. The best choices at such
prices are repaired until they fit and filled up while something still fits; the best of them counts. A few items, where
whole items matter most, are then searched completely, with the bound cutting off what cannot win.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
ROUNDS = 100
TRY_EVERY = 25  # of the rounds' prices, to repair and fill
TILTS = (0.0, 0.05)
CLOSE = 0.005  # of the value: then nothing more is tried
FEW_ITEMS = 16
MOST_NODES = 20_000
TOLERANCE = 1e-3  # of the value: less is not searched for
_EPS = 1e-9


class Infeasible(ValueError):
    """Even the cheapest allowed states exceed a cap. `cap` is its index."""

    def __init__(self, cap: int, used: float, room: float) -> None:
        super().__init__(f"cap {cap}: {used:g} of {room:g}")
        self.cap = cap


@dataclass(frozen=True)
class Choice:
    """The chosen states, what they are worth, and what no choice can exceed."""

    states: Ints  # [N]
    value: float
    bound: float


def solve(
    values: Floats, costs: Floats, caps: Floats, allowed: NDArray[np.bool_], order: Ints
) -> Choice:
    """Choose one allowed state per item: the most value within the caps.

    Parameters
    ----------
    values : [N, J]
    costs : [N, J, C], >= 0
        Among the allowed states of an item, one has the least cost in every cap.
    caps : [C], >= 0
    allowed : bool [N, J], at least one in every row
    order : [N]
        Of equally good items, the one with the lower number is served first.

    Raises
    ------
    Infeasible

    Examples
    --------
    >>> v, c = np.array([[0, 3.0], [0, 2.0], [0, 2.0]]), np.array([[0, 3.0], [0, 2.0], [0, 2.0]])
    >>> solve(v, c[..., None], np.array([4.0]), np.ones((3, 2), bool), np.arange(3)).states.tolist()
    [0, 1, 1]
    """
    # Everything in shares of the caps. What costs nothing of an empty cap is free there.
    share = costs / np.maximum(caps, 1e-300)
    share = np.where(np.isfinite(share), share, 1e300)
    values = np.where(allowed, values, -np.inf)
    total = np.where(allowed, share.sum(2), np.inf)
    least = _first_best(-total, values)
    used = _used(share, least)
    if (used > 1 + _EPS).any():
        cap = int(np.argmax(used))
        raise Infeasible(cap, float(used[cap] * caps[cap]), float(caps[cap]))
    # States that can never fit beside the cheapest of all others only disturb the prices.
    alone = used + share - share[np.arange(len(share)), least][:, None]
    values = np.where((alone <= 1 + _EPS).all(2), values, -np.inf)
    # Equal items change sides of a price all at once. The second try makes the later ones worth a little less.
    late = np.argsort(np.argsort(order, kind="stable"), kind="stable")[:, None] / len(order)
    states, best, bound = least, -np.inf, np.inf
    for tilt in TILTS:
        seen = values * (1 - tilt * late)
        tried, _ = _prices(seen, share)
        for prices in tried:
            trial = _first_best(seen - share @ prices, -share.sum(2))
            trial = _repair(seen, share, trial, least, prices, order)
            trial = _fill(values, share, _fill(seen, share, trial, prices, order), prices, order)
            if (value := _value(values, trial)) > best + 1e-12:
                states, best = trial, value
        prices, bound = _tighten(values, share, tried[0], bound, best)
        if bound - best <= CLOSE * abs(best):
            break
    if len(values) <= FEW_ITEMS:
        states = _search(values, share, states, prices)
    value = _value(values, states)
    return Choice(states, value, max(bound, value))


def _first_best(first: Floats, second: Floats) -> Ints:
    """Per row the column with the largest `first`; of equal ones the largest `second`, then the lowest column."""
    best = first >= first.max(1, keepdims=True) - 1e-15 * np.abs(first.max(1, keepdims=True))
    return np.argmax(np.where(best, second, -np.inf), axis=1)


def _used(share: Floats, states: Ints) -> Floats:
    return share[np.arange(len(states)), states].sum(0)


def _value(values: Floats, states: Ints) -> float:
    return float(values[np.arange(len(states)), states].sum())


def _prices(values: Floats, share: Floats) -> tuple[list[Floats], float]:
    """Prices [C] worth trying, the best first, and their bound (Lagrange: no choice is worth more)."""
    caps = share.shape[2]
    span = float(np.ptp(values[np.isfinite(values)])) or 1.0
    prices = np.full(caps, span * len(values) / caps)
    seen: list[tuple[float, Floats]] = []
    for turn in range(ROUNDS):
        net = values - share @ prices
        chosen = np.argmax(net, axis=1)
        seen.append((float(net.max(1).sum() + prices.sum()), prices))
        # Too much raises a price, too little lowers it; smaller and smaller steps.
        prices = prices * np.exp(np.clip(_used(share, chosen) - 1, -1, 1) * (2.0 * 0.95**turn))
    bound, best = min(seen, key=lambda pair: pair[0])
    return [best, *(prices for _, prices in seen[TRY_EVERY - 1 :: TRY_EVERY])], bound


def _tighten(
    values: Floats, share: Floats, prices: Floats, bound: float, value: float
) -> tuple[Floats, float]:
    """Lower the bound by subgradient steps, as long as the gap to a known value says (Polyak)."""
    best, at = bound, prices
    for _ in range(ROUNDS):
        if best - value <= TOLERANCE * abs(value):
            break
        net = values - share @ at
        dual = float(net.max(1).sum() + at.sum())
        if dual < best:
            best, prices = dual, at
        slope = 1 - _used(share, np.argmax(net, axis=1))
        step = (dual - value) / max(float(slope @ slope), 1e-300)
        at = np.maximum(at - step * slope, 0)
    return prices, best


def _moves(item: Ints, target: Ints, rate: Floats, order: Ints) -> tuple[Ints, Ints]:
    """Moves by falling rate, then by order; of every item the first only."""
    first = np.lexsort((order[item], -rate))
    item, target = item[first], target[first]
    _, once = np.unique(item, return_index=True)
    once.sort()
    return item[once], target[once]


def _repair(
    values: Floats, share: Floats, states: Ints, least: Ints, prices: Floats, order: Ints
) -> Ints:
    """Take cheaper states, those first that lose the least value per price of what they free."""
    states, rows = states.copy(), np.arange(len(states))
    while (over := (used := _used(share, states)) > 1 + _EPS).any():
        weight = np.where(over, np.maximum(prices, _EPS), 0)
        freed = share[rows, states][:, None] - share
        lost = values[rows, states][:, None] - values
        gain = freed @ weight
        item, target = np.nonzero((gain > 0) & (freed >= -_EPS).all(2) & np.isfinite(values))
        if not item.size:
            return least.copy()
        rate = -lost[item, target] / gain[item, target]
        item, target = _moves(item, target, rate, -order)
        left = used - np.cumsum(freed[item, target], axis=0)
        # As far as it takes until one of the caps holds.
        holds = (left[:, over] <= 1 + _EPS).any(1)
        count = int(np.argmax(holds)) + 1 if holds.any() else len(item)
        states[item[:count]] = target[:count]
    return states


def _fill(values: Floats, share: Floats, states: Ints, prices: Floats, order: Ints) -> Ints:
    """Take better states while one fits, those first that bring the most value per price."""
    states, rows = states.copy(), np.arange(len(states))
    weight = prices + _EPS * max(1.0, float(prices.max()))
    while True:
        used = _used(share, states)
        more = values - values[rows, states][:, None]
        extra = share - share[rows, states][:, None]
        item, target = np.nonzero((more > 1e-12) & (used + extra <= 1 + _EPS).all(2))
        if not item.size:
            return states
        price = np.maximum(extra @ weight, 1e-300)
        item, target = _moves(item, target, more[item, target] / price[item, target], order)
        step = extra[item, target]
        while item.size:
            # As many as fit together, then those of the rest that still fit alone.
            room = (used + np.cumsum(step, axis=0) <= 1 + _EPS).all(1)
            count = len(item) if room.all() else int(np.argmin(room))
            states[item[:count]] = target[:count]
            used = used + step[:count].sum(0)
            rest = np.flatnonzero((used + step[count:] <= 1 + _EPS).all(1)) + count
            item, target, step = item[rest], target[rest], step[rest]


def _search(values: Floats, share: Floats, states: Ints, prices: Floats) -> Ints:
    """Branch and bound from a first choice; exact to `TOLERANCE` unless there are too many nodes."""
    net = values - share @ prices
    # Items whose states differ most are decided first.
    order = np.argsort(-(values.max(1) - np.where(np.isfinite(values), values, np.inf).min(1)))
    cheapest = np.where(np.isfinite(values)[..., None], share, np.inf).min(1)
    after = np.zeros(len(order) + 1)
    need = np.zeros((len(order) + 1, share.shape[2]))
    for place in range(len(order) - 1, -1, -1):
        after[place] = after[place + 1] + net[order[place]].max()
        need[place] = need[place + 1] + cheapest[order[place]]
    best, found = _value(values, states), states.copy()
    trial, nodes = states.copy(), 0

    def visit(place: int, value: float, used: Floats) -> None:
        nonlocal best, found, nodes
        nodes += 1
        if place == len(order):
            if value > best + 1e-12:
                best, found = value, trial.copy()
            return
        item = order[place]
        for state in np.argsort(-net[item], kind="stable").tolist():
            if nodes > MOST_NODES or not np.isfinite(values[item, state]):
                return
            now, worth = used + share[item, state], value + values[item, state]
            if (now + need[place + 1] > 1 + _EPS).any():
                continue
            if worth + after[place + 1] + prices @ (1 - now) <= best + TOLERANCE * abs(best):
                continue
            trial[item] = state
            visit(place + 1, worth, now)

    visit(0, 0.0, np.zeros(share.shape[2]))
    return found
