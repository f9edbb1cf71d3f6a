"""Divide rows among devices as life does: every device sees its own, skewed mix.

Letters: N rows, D devices, G groups (labels, or domains of labels).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def dirichlet(
    groups: Sequence[str],
    devices: int,
    rows_per_device: int | Sequence[int],
    alpha: float,
    rng: np.random.Generator,
) -> list[NDArray[np.int64]]:
    """Draw for each device its own mix of groups from Dirichlet(alpha), then rows to that mix.

    Parameters
    ----------
    groups : sequence of N str
        Group of each row.
    devices : int
        D.
    rows_per_device : int, or D int
        At most so many rows each; fewer when D times that many do not exist. D numbers: exactly so many.
    alpha : float
        Concentration: 0.1 gives nearly one group per device, 100 nearly the same mix for all.
    rng : numpy Generator

    Returns
    -------
    D arrays of row indices, disjoint, of equal length unless lengths are given

    Raises
    ------
    ValueError
        alpha is not positive, there are fewer rows than devices, or fewer than the lengths ask for.

    Examples
    --------
    >>> parts = dirichlet("aabb", 2, 2, 1.0, np.random.default_rng(0))
    >>> sorted(int(i) for part in parts for i in part)
    [0, 1, 2, 3]
    """
    if alpha <= 0:
        raise ValueError(f"alpha {alpha} found, a positive number wanted")
    if len(groups) < devices:
        raise ValueError(f"{len(groups)} rows are too few for {devices} devices")
    names = sorted(set(groups))
    where: dict[str, list[int]] = {name: [] for name in names}
    for index in rng.permutation(len(groups)):
        where[groups[index]].append(int(index))
    if isinstance(rows_per_device, int):
        wanted = [min(rows_per_device, len(groups) // devices)] * devices
    else:
        wanted = [int(n) for n in rows_per_device]
    if len(wanted) != devices or sum(wanted) > len(groups):
        raise ValueError(f"{sum(wanted)} rows for {len(wanted)} devices wanted of {len(groups)}")
    taken: list[list[int]] = [[] for _ in range(devices)]
    mixes = rng.dirichlet(np.full(len(names), alpha), size=devices)
    # One row each in turn, so that no device empties a group before the others have had theirs.
    for turn in range(max(wanted)):
        for device in range(devices):
            if turn >= wanted[device]:
                continue
            left = np.array([bool(where[name]) for name in names])
            share = np.where(left, mixes[device] + 1e-9, 0.0)
            group = int(rng.choice(len(names), p=share / share.sum()))
            taken[device].append(where[names[group]].pop())
    return [np.array(sorted(rows), dtype=np.int64) for rows in taken]


def balanced(labels: Sequence[str], count: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Pick up to `count` rows with the same number of each label, at most a fifth of any label.

    Returns
    -------
    int64 array of row indices, sorted

    Examples
    --------
    >>> rows = balanced(["a"] * 10 + ["b"] * 20, 4, np.random.default_rng(0))
    >>> [int((rows < 10).sum()), int((rows >= 10).sum())]
    [2, 2]
    """
    where: dict[str, list[int]] = {}
    for index in rng.permutation(len(labels)):
        where.setdefault(labels[index], []).append(int(index))
    if not where:
        return np.array([], dtype=np.int64)
    smallest = min(max(1, len(rows) // 5) for rows in where.values())
    each = max(1, min(count // len(where), smallest))
    return np.array(sorted(i for name in sorted(where) for i in where[name][:each]), dtype=np.int64)
