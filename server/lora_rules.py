"""How the LoRA factors of one expert and projection are combined. Pure: arrays in, arrays out.

Letters: K holders, R rank of the adapter, r <= R rank of a holder, I input and O output features. A is [R, I], B is
[O, R]; shares w_k of the holders and the share of the old value sum to 1.

LoRA factors must not be averaged on their own: mean(B) mean(A) is not mean(BA), see `bias`. The default rule averages
the products and projects them back to rank R by a QR core, which never forms the O x I matrix.

A device whose slot has rank r < R got the first r rows of A and columns of B and knows nothing of the rest. Its
contribution stands for what it trained plus the rest as it was, B_k A_k + B[:, r:] A[r:]: it votes for the old tail
instead of erasing it. FlexLoRA pads with zeros instead (`tail_vote=False`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Array = NDArray[np.float32]
Factors = tuple[NDArray[np.floating], NDArray[np.floating], float]
"""A [r, I], B [O, r] and share of one holder."""
FRESH_NORM = 1 / np.sqrt(3.0)  # norm of a row of `lora.fresh_a`


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


def mean(old: Array, values: Iterable[tuple[NDArray[np.floating], float]]) -> Array:
    """Weighted mean of one factor or row; what lies beyond a value's rank counts as unchanged.

    Parameters
    ----------
    old : the adapter's
    values : (value, share), consumed once: memory stays at one value plus the running sum

    Examples
    --------
    >>> mean(np.zeros((2, 1), np.float32), [(np.full((2, 1), 4.0), 0.5), (np.full((1, 1), 8.0), 0.25)]).tolist()
    [[4.0], [2.0]]
    """
    wide = old.astype(np.float64)
    moved = np.zeros_like(wide)
    for value, share in values:
        mine = tuple(slice(n) for n in value.shape)
        moved[mine] += share * (value - wide[mine])
    return np.asarray(wide + moved, np.float32)


def terms(
    old_a: Array, old_b: Array, holders: Sequence[Factors], *, tail_vote: bool = True
) -> tuple[list[NDArray[np.floating]], list[NDArray[np.floating]]]:
    """The new product as a sum: `sum_k w_k B_k A_k` and what stays of the old product.

    Returns
    -------
    left : arrays [O, n], shares multiplied in
    right : arrays [n, I]
    """
    wide_b = old_b.astype(np.float64)
    left: list[NDArray[np.floating]] = [w * b.astype(np.float64) for _, b, w in holders]
    right = [a for a, _, _ in holders]
    # How much of each of the old product's R terms stays: the prior's share, and that of all who did not have it.
    stays = np.full(old_a.shape[0], max(0.0, 1.0 - sum(w for _, _, w in holders)))
    for a, _, w in holders if tail_vote else ():
        stays[a.shape[0] :] += w
    kept = stays > 0
    if kept.any() and wide_b.any():
        left.append(stays[kept] * wide_b[:, kept])
        right.append(old_a[kept])
    return left, right


def product(
    old_a: Array, old_b: Array, holders: Sequence[Factors], *, tail_vote: bool = True
) -> tuple[Array, Array, float]:
    """Average of the products, projected back to rank R; also the share of the squared product that was cut off."""
    rank = old_a.shape[0]
    left, right = terms(old_a, old_b, holders, tail_vote=tail_vote)
    if sum(len(a) for a in right) < rank:
        # Too few directions for R rows: the old ones are kept, with no weight, so that they stay trainable.
        left.append(np.zeros(old_b.shape))
        right.append(old_a)
    a, b, tail = reproject(left, right, rank)
    return a.astype(np.float32), b.astype(np.float32), tail


def product_norm(
    left: Sequence[NDArray[np.floating]], right: Sequence[NDArray[np.floating]]
) -> float:
    """Frobenius norm of `sum_k left_k @ right_k` by Gram matrices, without the O x I matrix.

    Good to about 1e-8 of the largest term, because it takes a root of a difference.

    >>> product_norm([np.array([[3.0], [0.0]])], [np.array([[0.0, 2.0]])])
    6.0
    """
    wide_left = np.concatenate(left, axis=1, dtype=np.float64)
    wide_right = np.concatenate(right, axis=0, dtype=np.float64)
    squared = float(((wide_left.T @ wide_left) * (wide_right @ wide_right.T)).sum())
    return float(np.sqrt(max(squared, 0.0)))


def bias(old_a: Array, old_b: Array, holders: Sequence[Factors]) -> tuple[float, float]:
    """What plain factor averaging would get wrong, and how far the products themselves move.

    `sum_k w_k B_k A_k - Bbar Abar = sum_k w_k (B_k - Bbar)(A_k - Abar)`, exactly, where the old factors count as a
    holder with the remaining share. It is zero for equal factors, and for rules that train only one of them.

    Returns
    -------
    residual : Frobenius norm of that sum
    update : Frobenius norm of `sum_k w_k B_k A_k` less the old product
    """
    rank, n = len(old_a), len(holders)
    # Changes of every holder, padded to rank R, then the old factors: all that is asked for are sums of their products.
    right = np.zeros(((n + 1) * rank, old_a.shape[1]))
    left = np.zeros((old_b.shape[0], (n + 1) * rank))
    for k, (a, b, _) in enumerate(holders):
        place = slice(k * rank, k * rank + len(a))
        right[place] = a - old_a[: len(a)].astype(np.float64)
        left[:, place] = b - old_b[:, : len(a)].astype(np.float64)
    right[n * rank :], left[:, n * rank :] = old_a, old_b
    gram_left, gram_right = left.T @ left, right @ right.T
    w = np.array([share for _, _, share in holders])
    residual, update = np.zeros((2, n + 1, n + 1))
    residual[:n, :n] = np.diag(w) - np.outer(w, w)
    update[:n, :n], update[:n, n], update[n, :n] = np.diag(w), w, w
    norms = []
    for terms_of in (residual, update):
        wide = np.kron(terms_of, np.eye(rank))
        squared = ((wide.T @ gram_left @ wide) * gram_right).sum()
        norms.append(float(np.sqrt(max(squared, 0.0))))
    return norms[0], norms[1]
