"""Guards against devices that disagree or lie. Pure.

They look at changes coordinate by coordinate or by their size. Factors may be compared so, because all devices of a
round started from the same ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from server.lora_rules import Array, Floats, mean
from server.rules import Robust, SignConflict

ENOUGH = 3  # holders: with two, nobody can say who is wrong
TRIM = 0.2  # share of the holders that is cut off at either end, at least one
AGREEMENT = 0.5  # least consensus under "drop": three quarters of the weight have the same sign
Values = Sequence[tuple[NDArray[np.floating], float]]
"""(value, share) per holder."""


def trimmed(values: NDArray[np.floating]) -> Floats:
    """Mean over the first axis without the largest and the smallest (arXiv 1803.01498).

    >>> trimmed(np.array([[1.0], [2.0], [4.0], [900.0]])).tolist()
    [3.0]
    """
    cut = max(1, int(TRIM * len(values)))
    return np.asarray(np.sort(values, axis=0)[cut : len(values) - cut].mean(0), np.float64)


def robust_mean(old: Array, values: Values, kind: Robust) -> Array:
    """`lora_rules.mean` with a median or trimmed mean of the changes where at least 3 hold a coordinate.

    The shares of the holders count only together: they say how much of the old value stays. Ranks may differ; every
    stretch of rows and columns is judged by those who have it.

    Examples
    --------
    >>> values = [(np.array([v]), 0.25) for v in (1.0, 2.0, 900.0)]
    >>> robust_mean(np.zeros(1, np.float32), values, "median").tolist()  # a quarter stays
    [1.5]
    """
    if kind == "mean":
        return mean(old, values)
    new = np.array(old)
    edges = [sorted({0, *(v.shape[axis] for v, _ in values)}) for axis in range(old.ndim)]
    stretches = [list(zip(e, e[1:], strict=False)) for e in edges]
    for place in np.ndindex(*(len(s) for s in stretches)):
        bounds = [stretches[axis][i] for axis, i in enumerate(place)]
        here = tuple(slice(*b) for b in bounds)
        inside = [
            (value[here], share)
            for value, share in values
            if all(value.shape[axis] >= stop for axis, (_, stop) in enumerate(bounds))
        ]
        if len(inside) < ENOUGH:
            new[here] = mean(old[here], inside)
            continue
        changes = np.stack([v for v, _ in inside]) - old[here].astype(np.float64)
        middle = np.median(changes, axis=0) if kind == "median" else trimmed(changes)
        new[here] = old[here] + sum(share for _, share in inside) * middle
    return new


def consensus(changes: Iterable[tuple[Floats, float]], shape: tuple[int, ...]) -> Floats:
    """How far the holders agree on the sign of every coordinate, 0 to 1, weighted by their shares.

    As the gradient consensus of arXiv 2009.00329 and the sign election of TIES (arXiv 2306.01708). A coordinate that
    a holder does not have or did not change has no vote of its.

    Examples
    --------
    >>> consensus([(np.array([1.0, 2.0]), 0.6), (np.array([-3.0]), 0.2)], (2,)).round(6).tolist()
    [0.5, 1.0]
    """
    signs, votes = np.zeros(shape), np.zeros(shape)
    for change, share in changes:
        mine = tuple(slice(n) for n in change.shape)
        signs[mine] += share * np.sign(change)
        votes[mine] += share * (change != 0)
    return np.divide(np.abs(signs), votes, out=np.ones(shape), where=votes > 0)


def damping(agreement: Floats, kind: SignConflict) -> Floats:
    """Factor on every coordinate's change: 0 or 1 ("drop"), the consensus itself ("scale"), or 1 ("off").

    >>> [damping(np.array([0.2, 1.0]), k).tolist() for k in ("off", "drop", "scale")]
    [[1.0, 1.0], [0.0, 1.0], [0.2, 1.0]]
    """
    if kind == "drop":
        return np.asarray(agreement >= AGREEMENT - 1e-9, np.float64)
    return agreement if kind == "scale" else np.ones_like(agreement)


def clip_factors(norms: Sequence[float], times: float, fallback: float = 0.0) -> list[float]:
    """Factor on each change that brings its norm down to at most `times` the median norm.

    Parameters
    ----------
    norms : of the holders' changes
    times : 0 is off
    fallback : a median to use where fewer than 3 hold the expert; 0: they are left alone

    Examples
    --------
    >>> clip_factors([1.0, 2.0, 40.0], 2.0)
    [1.0, 1.0, 0.1]
    >>> clip_factors([40.0], 2.0, fallback=2.0), clip_factors([40.0], 2.0), clip_factors([40.0], 0)
    ([0.1], [1.0], [1.0])
    """
    middle = float(np.median(norms)) if len(norms) >= ENOUGH else fallback
    if times <= 0 or middle <= 0:
        return [1.0] * len(norms)
    return [min(1.0, times * middle / norm) if norm > 0 else 1.0 for norm in norms]
