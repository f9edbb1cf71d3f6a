"""Statistics of the scoreboard, pure: intervals over seeds, paired differences, robustness, rounds to a target.

S seeds, N rows or clients, T tasks, D bootstrap draws. Every interval is a 95 % interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Strata = Sequence[ArrayLike]
"""One seed's paired differences: an array [N] for each task."""

# 0.975 quantiles of Student's t for 1, 2, ... 30 degrees of freedom (NIST handbook, table 1.3.6.7.2).
_T975 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its 95 % interval; `low` and `high` are NaN where there is too little to tell."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2

    @property
    def sign(self) -> int:
        """1 or -1 if the whole interval lies on one side of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)


def t_quantile(freedom: int) -> float:
    """The 0.975 quantile of Student's t, within 0.001.

    Examples
    --------
    >>> t_quantile(2)
    4.303
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom, wanted 1 or more")
    if freedom <= len(_T975):
        return _T975[freedom - 1]
    z = 1.959964  # the normal quantile and its first two corrections (Cornish and Fisher)
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    )  # fmt: skip


def t_interval(values: ArrayLike) -> Interval:
    """Mean of one value per seed, with Student's interval. One seed has a mean and no interval.

    On the differences of two methods with the same seeds this is the paired t interval.

    Parameters
    ----------
    values : float [S]
        A NaN (a diverged run) makes everything NaN.

    Examples
    --------
    >>> i = t_interval([1.0, 2.0, 3.0])   # sd 1, 4.303 / sqrt(3) = 2.484
    >>> i.mean, round(i.half, 3)
    (2.0, 2.484)
    """
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or not len(data):
        raise ValueError(f"found an array of shape {data.shape}, wanted one value per seed")
    mean = float(data.mean())
    if len(data) == 1:
        return Interval(mean=mean, low=math.nan, high=math.nan, count=1)
    half = t_quantile(len(data) - 1) * float(data.std(ddof=1)) / math.sqrt(len(data))
    return Interval(mean=mean, low=mean - half, high=mean + half, count=len(data))


def _draw_means(
    values: NDArray[np.float64], rng: np.random.Generator, draws: int
) -> NDArray[np.float64]:
    """Means of `draws` resamples of `values`, float [D]."""
    if len(values) == 1:
        return np.full(draws, values[0])
    levels, counts = np.unique(values, return_counts=True)
    if len(levels) * 4 < len(values):  # right/wrong differences take three values: a multinomial
        drawn = rng.multinomial(len(values), counts / len(values), size=draws)
        return np.asarray(drawn @ levels / len(values), dtype=np.float64)
    return np.asarray(values[rng.integers(len(values), size=(draws, len(values)))].mean(axis=1))


def hierarchical_bootstrap(
    seeds: Sequence[Strata], rng: np.random.Generator, draws: int = 4000
) -> Interval:
    """Mean paired difference with a percentile interval: seeds are drawn again, then rows within each.

    Parameters
    ----------
    seeds : S sequences of T arrays [N]
        Paired differences (ours - theirs) of rows or clients, by seed and task; N may differ. An array of one value,
        where only the seed's score is known, adds no spread of its own. The statistic is the mean over seeds of the
        mean over tasks of the mean over rows.
    rng : numpy.random.Generator
    draws : int
        D.

    Notes
    -----
    With few seeds the percentile interval is too narrow (three seeds give ten different resamples); the page shows
    Student's interval over seeds beside it. One seed: rows are drawn and seeds cannot be, so the interval speaks of the
    rows alone; with one value in all it is NaN.

    Examples
    --------
    >>> hierarchical_bootstrap([[[1.0, 1.0]], [[1.0, 1.0]]], np.random.default_rng(0)).low
    1.0
    """
    data = [[np.asarray(v, dtype=np.float64) for v in strata] for strata in seeds]
    if not data or any(len(strata) != len(data[0]) or not strata for strata in data):
        raise ValueError("wanted one array or more for every seed, and as many for each")
    if any(v.ndim != 1 or not len(v) for strata in data for v in strata):
        raise ValueError("found an empty or nested array, wanted differences [N]")
    mean = float(np.mean([np.mean([v.mean() for v in strata]) for strata in data]))
    if math.isnan(mean) or (len(data) == 1 and all(len(v) == 1 for v in data[0])):
        return Interval(mean=mean, low=math.nan, high=math.nan, count=len(data))
    total = np.zeros(draws)
    for _ in data:
        chosen = rng.integers(len(data), size=draws)
        for index, strata in enumerate(data):
            places = np.flatnonzero(chosen == index)
            for values in strata:
                total[places] += _draw_means(values, rng, len(places)) / len(strata)
    low, high = np.quantile(total / len(data), [0.025, 0.975])
    return Interval(mean=mean, low=float(low), high=float(high), count=len(data))


def coefficient_of_variation(values: ArrayLike) -> float:
    """Standard deviation (n - 1) over mean: how much a method depends on the setting (FedMoE, arXiv 2408.11304).

    NaN for fewer than two values or a mean of 0.

    Examples
    --------
    >>> round(coefficient_of_variation([2.0, 4.0]), 4)
    0.4714
    """
    data = np.asarray(values, dtype=np.float64)
    if data.size < 2 or data.mean() == 0:
        return math.nan
    return float(data.std(ddof=1) / data.mean())


def first_reaching(
    rounds: Sequence[int], values: Sequence[float], level: float, lower_is_better: bool = False
) -> int | None:
    """The first of `rounds` whose value reaches `level`; None if none does.

    Examples
    --------
    >>> first_reaching([0, 5, 10], [0.2, 0.5, 0.6], 0.9 * 0.55)
    5
    """
    for number, value in zip(rounds, values, strict=True):
        if (value <= level) if lower_is_better else (value >= level):
            return number
    return None


def relative_reduction(before: float, after: float) -> float:
    """The share of a loss that training took away: 1 - after / before. NaN if it was not positive before.

    Examples
    --------
    >>> relative_reduction(4.0, 3.0)
    0.25
    """
    return 1 - after / before if before > 0 else math.nan
