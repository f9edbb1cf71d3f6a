"""Accepted updates -> the next global adapter. Pure: arrays in, arrays out.

Letters: K contributors of a key, R rank of the run, r <= R rank of a contribution, I input and O output features.

Every key has its own weights: a device counts for an expert with the tokens that trained that expert there. A small
prior mass `a_0` stands for the old value, so that a lone contributor does not simply overwrite it. LoRA factors must
not be averaged on their own (mean(B) mean(A) is not mean(BA)); the default rule aggregates the products and projects
them back to rank R by a QR core, which never forms the O x I matrix.

A device whose slot has rank r < R got the first r rows of A and columns of B and knows nothing of the rest. Its
contribution stands for what it trained plus the rest as it was, B_k A_k + B[:, r:] A[r:]: it votes for the old tail
instead of erasing it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol import names

Floats = NDArray[np.float64]
Array = NDArray[np.float32]
FRESH_NORM = 1 / np.sqrt(3.0)  # norm of a row of `lora.fresh_a`
# An activation stands between the factors of an adapter expert: they are averaged one by one.
NOT_A_PRODUCT = ("adapter",)


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One accepted update. `weights` maps (layer id, expert id) to the tokens that trained it.

    Factors are [r, I] and [O, r], r <= R; each expert may have its own r.
    """

    device: str
    tensors: Mapping[str, NDArray[np.float32]]
    weights: Mapping[tuple[int, int], float]


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """The new adapter and what the history says about it."""

    adapter: dict[str, Array]
    prior_mass: float
    tail_mean: float  # share of the squared product beyond rank R that was cut off
    tail_max: float


def reproject(
    left: Sequence[NDArray[np.floating]], right: Sequence[NDArray[np.floating]], rank: int
) -> tuple[Floats, Floats, float]:
    """Best rank-R factors of `sum_k left_k @ right_k`.

    Parameters
    ----------
    left : K arrays [O, R_k], weights already multiplied in
    right : K arrays [R_k, I]

    Returns
    -------
    a : [R, I], orthogonal rows with the norm of a fresh A, so that directions of no weight yet stay trainable; its
        first r rows, with the first r columns of `b`, are the best factors of rank r
    b : [O, R], columns of falling norm
    tail : squared singular values beyond R over all of them

    Examples
    --------
    >>> a, b, tail = reproject([np.array([[2.0], [0.0]])], [np.array([[0.0, 3.0]])], 1)
    >>> (b @ a).round(6).tolist(), tail
    ([[0.0, 6.0], [0.0, 0.0]], 0.0)
    """
    q_left, r_left = np.linalg.qr(np.concatenate(left, axis=1, dtype=np.float64))
    q_right, r_right = np.linalg.qr(np.concatenate(right, axis=0, dtype=np.float64).T)
    u, s, vt = np.linalg.svd(r_left @ r_right.T, full_matrices=True)
    k = min(rank, len(s))
    total = float((s**2).sum())
    tail = float((s[k:] ** 2).sum()) / total if total > 0 else 0.0
    # `vt` is square: rows beyond len(s) are directions with singular value 0.
    a = np.zeros((rank, q_right.shape[0]))
    rows = min(rank, vt.shape[0])
    a[:rows] = FRESH_NORM * (vt[:rows] @ q_right.T)
    b = np.zeros((q_left.shape[0], rank))
    b[:, :k] = (q_left @ u[:, :k]) * (s[:k] / FRESH_NORM)
    return a, b, tail


def centred(rows: Mapping[int, Floats]) -> dict[int, Floats]:
    """Changes of router rows less their mean over the device's rows of the layer.

    Softmax does not see a common shift, but Adam produces one; devices with different experts would mix theirs in.

    >>> {e: r.tolist() for e, r in centred({0: np.array([1.0]), 5: np.array([3.0])}).items()}
    {0: [-1.0], 5: [1.0]}
    """
    if not rows:
        return {}
    mean = sum(rows[e] for e in sorted(rows)) / len(rows)
    return {e: np.asarray(row - mean) for e, row in rows.items()}


def aggregate(
    adapter: Mapping[str, Array],
    contributions: Sequence[Contribution],
    projections: Sequence[str],
    *,
    rule: str = "svd",
    prior: float = 0.05,
) -> Aggregated:
    """Fold the contributions of one round into the adapter.

    Parameters
    ----------
    adapter : all global names -> float32
    contributions : any order; the result does not depend on it
    projections : of an expert of this base
    rule : "svd" | "factors"
        "factors" takes plain weighted means of A and of B (FedIT), and so do adapter experts under either rule.
    prior : float >= 0
        Prior mass as a share of the median total mass of the experts trained in this round.

    Returns
    -------
    Aggregated
        Experts and rows that nobody trained keep the very same arrays.
    """
    ordered = sorted(contributions, key=lambda c: c.device)
    holders: dict[tuple[int, int], list[tuple[Contribution, float]]] = {}
    for c in ordered:
        for key, weight in c.weights.items():
            if weight > 0:
                holders.setdefault(key, []).append((c, float(weight)))
    if not holders:
        return Aggregated(adapter=dict(adapter), prior_mass=0.0, tail_mean=0.0, tail_max=0.0)
    a_0 = prior * float(np.median([sum(w for _, w in holders[key]) for key in sorted(holders)]))
    shifts = {c.device: _router_shifts(adapter, c) for c in ordered}
    new = dict(adapter)
    tails: list[float] = []
    for layer, expert in sorted(holders):
        members = holders[layer, expert]
        total = a_0 + sum(w for _, w in members)
        parts = [(c, w / total) for c, w in members]
        for projection in projections:
            key_a = names.lora(layer, expert, projection, "lora_A")
            key_b = names.lora(layer, expert, projection, "lora_B")
            if rule == "factors" or projection in NOT_A_PRODUCT:
                new[key_a], new[key_b] = _mean(adapter, key_a, parts), _mean(adapter, key_b, parts)
                continue
            new[key_a], new[key_b], tail = _product(adapter, key_a, key_b, parts)
            tails.append(tail)
        row = names.router_row(layer, expert)
        moved = sum(w * shifts[c.device][layer][expert] for c, w in parts)
        new[row] = (adapter[row] + moved).astype(np.float32)
    return Aggregated(
        adapter=new,
        prior_mass=a_0,
        tail_mean=float(np.mean(tails)) if tails else 0.0,
        tail_max=max(tails, default=0.0),
    )


def _mean(
    adapter: Mapping[str, Array], key: str, parts: Sequence[tuple[Contribution, float]]
) -> Array:
    """Weighted mean of a factor; what lies beyond a contribution's rank counts as unchanged."""
    old = adapter[key].astype(np.float64)
    moved = np.zeros_like(old)
    for c, w in parts:
        value = c.tensors[key]
        mine = tuple(slice(n) for n in value.shape)
        moved[mine] += w * (value - old[mine])
    return np.asarray(old + moved, np.float32)


def _product(
    adapter: Mapping[str, Array],
    key_a: str,
    key_b: str,
    parts: Sequence[tuple[Contribution, float]],
) -> tuple[Array, Array, float]:
    old_a, old_b = adapter[key_a], adapter[key_b].astype(np.float64)
    rank = old_a.shape[0]
    left = [w * c.tensors[key_b].astype(np.float64) for c, w in parts]
    right = [c.tensors[key_a] for c, _ in parts]
    # How much of each of the old product's R terms stays: the prior's share, and the share of all who did not have it.
    stays = np.full(rank, max(0.0, 1.0 - sum(w for _, w in parts)))
    for c, w in parts:
        stays[c.tensors[key_a].shape[0] :] += w
    kept = stays > 0
    if kept.any() and old_b.any():
        left.append(stays[kept] * old_b[:, kept])
        right.append(old_a[kept])
    if sum(len(a) for a in right) < rank:
        # Too few directions for R rows: the old ones are kept, with no weight, so that they stay trainable.
        left.append(np.zeros_like(old_b))
        right.append(old_a)
    a, b, tail = reproject(left, right, rank)
    return a.astype(np.float32), b.astype(np.float32), tail


def _router_shifts(adapter: Mapping[str, Array], c: Contribution) -> dict[int, dict[int, Floats]]:
    """layer -> expert -> centred change of the router row since the lease."""
    moved: dict[int, dict[int, Floats]] = {}
    for key, value in c.tensors.items():
        name = names.parse(key)
        if name is not None and name.projection is None:
            change = value.astype(np.float64) - adapter[key]
            moved.setdefault(name.layer, {})[name.expert] = change
    return {layer: centred(rows) for layer, rows in moved.items()}
