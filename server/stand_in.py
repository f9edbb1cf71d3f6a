"""What a token does whose expert is not on the device: nothing, the nearest resident, or a merged stand-in. Pure.

Letters: E experts of a layer, R residents in slot order, D numbers of a fingerprint, N tokens, d width of the model.

Masked, a token's routing weight goes to whatever else is resident, by the router. With a map, the weight of an absent
expert goes to the resident whose output is most like it. With a merged stand-in, the absent experts become one, an
average by how often and how strongly they are used (Flux, arXiv 2508.19078). REAP (arXiv 2510.13999) finds that merging
loses the router's control over its experts. `benchmarks.stand_in` compares them on real text: devices mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from server.relevance import Floats

NOTHING = -1  # slot of an expert that nobody stands in for


class StandInError(ValueError):
    """Residents or arrays that do not belong together."""


def similarity(fingerprints: Floats) -> Floats:
    """Cosine between experts.

    Parameters
    ----------
    fingerprints : [E, D]
        Mean outputs of each expert on one set of tokens, or its weights in a row. A row of zeros is like no other.

    Returns
    -------
    [E, E], in [-1, 1]

    Examples
    --------
    >>> similarity(np.array([[1.0, 0.0], [2.0, 0.0], [0.0, 3.0]])).tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    norm = np.linalg.norm(fingerprints, axis=-1, keepdims=True)
    unit = np.divide(fingerprints, norm, out=np.zeros_like(fingerprints), where=norm > 0)
    return np.asarray(np.clip(unit @ unit.T, -1.0, 1.0))


def nearest(alike: Floats, resident: Sequence[int], *, least: float = -1.0) -> NDArray[np.int64]:
    """The slot that serves each expert: its own, or that of the resident most like it.

    Parameters
    ----------
    alike : [E, E], as from `similarity`
    resident : R different experts in slot order
    least : float
        An expert that is less like every resident than this gets NOTHING.

    Returns
    -------
    [E], slots or NOTHING; of equally near residents the first slot

    Raises
    ------
    StandInError

    Examples
    --------
    >>> alike = np.array([[1.0, 0.9, 0.1], [0.9, 1.0, 0.2], [0.1, 0.2, 1.0]])
    >>> nearest(alike, [2, 0]).tolist()
    [1, 1, 0]
    >>> nearest(alike, [2], least=0.15).tolist()
    [-1, 0, 0]
    """
    held = _resident(resident, len(alike))
    if alike.shape != (len(alike), len(alike)) or not np.isfinite(alike).all():
        raise StandInError(f"similarity {alike.shape}: finite and square wanted")
    found = alike[:, held]
    slot = found.argmax(1)
    slot = np.where(found.max(1) < least, NOTHING, slot)
    slot[held] = np.arange(len(held))
    return np.asarray(slot, np.int64)


def masked(experts: int, resident: Sequence[int]) -> NDArray[np.int64]:
    """The map [E] of a device that only masks: residents have their slots, the others NOTHING.

    >>> masked(4, [2, 0]).tolist()
    [1, -1, 0, -1]
    """
    held = _resident(resident, experts)
    slot = np.full(experts, NOTHING, np.int64)
    slot[held] = np.arange(len(held))
    return slot


def reroute(g: Floats, slot: NDArray[np.int64], slots: int) -> Floats:
    """Routing weights of all experts -> of the slots, by a map.

    Parameters
    ----------
    g : [N, E], >= 0
    slot : [E], as from `nearest` or `masked`
    slots : R

    Returns
    -------
    [N, R]; a row sums to what it did, less the weight of experts without a stand-in (the missed mass)

    Examples
    --------
    >>> reroute(np.array([[0.5, 0.3, 0.2]]), np.array([1, 1, -1]), 2).tolist()
    [[0.0, 0.8]]
    """
    served = slot >= 0
    onto = np.zeros((len(slot), slots))
    onto[np.flatnonzero(served), slot[served]] = 1.0
    return np.asarray(g @ onto)


def merge_weights(frequency: Floats, importance: Floats, resident: Sequence[int]) -> Floats:
    """Share of each absent expert in the merged stand-in: alpha_e = f_e * a_e over their sum (Flux).

    Parameters
    ----------
    frequency : [E], >= 0, how often each expert is routed to
    importance : [E], >= 0, how strongly: Flux takes the mean attention of its tokens; an output norm will do
    resident : at least one expert must be absent

    Returns
    -------
    [E], 0 for residents, sums to 1; even when no absent expert is ever used

    Raises
    ------
    StandInError

    Examples
    --------
    >>> merge_weights(np.array([5.0, 3.0, 1.0]), np.array([1.0, 1.0, 3.0]), [0]).tolist()
    [0.0, 0.5, 0.5]
    """
    absent = masked(len(frequency), resident) == NOTHING
    if not absent.any():
        raise StandInError("every expert is resident: nothing to merge")
    if (frequency < 0).any() or (importance < 0).any():
        raise StandInError("negative frequency or importance")
    alpha = np.where(absent, frequency * importance, 0.0)
    if not alpha.any():
        alpha = absent.astype(np.float64)
    return np.asarray(alpha / alpha.sum())


def merge(alpha: Floats, tensors: NDArray[np.floating]) -> NDArray[np.floating]:
    """Weighted mean of one kind of weight, [E, ...] -> [...], summed in float64 and given back in its own type.

    >>> merge(np.array([0.0, 0.5, 0.5]), np.array([[9.0], [1.0], [3.0]])).tolist()
    [2.0]
    """
    mean = np.tensordot(alpha, tensors, axes=1)
    return np.asarray(mean, tensors.dtype)


def merge_router(alpha: Floats, rows: NDArray[np.floating]) -> tuple[NDArray[np.floating], float]:
    """Router row and bias under which the stand-in draws about the weight that the absent experts drew together.

    Their joint logit is ln sum_e exp(w_e x). For any alpha it is at least sum_e alpha_e w_e x + H(alpha) (Gibbs), and
    equal to it where alpha are their shares of the token. A router without a bias can only take the row; the stand-in
    then draws as much as one of the experts.

    Parameters
    ----------
    alpha : [E], as from `merge_weights`
    rows : [E, d]

    Returns
    -------
    row [d], bias H(alpha) in nats

    Examples
    --------
    Two equal experts draw twice the weight of one.

    >>> row, bias = merge_router(np.array([0.5, 0.5]), np.array([[1.0, 2.0], [1.0, 2.0]]))
    >>> row.tolist(), round(float(np.exp(bias)), 6)
    ([1.0, 2.0], 2.0)
    """
    used = alpha[alpha > 0]
    return merge(alpha, rows), float(-(used * np.log(used)).sum())


def _resident(resident: Sequence[int], experts: int) -> NDArray[np.int64]:
    held = np.asarray(resident, np.int64)
    if held.ndim != 1 or not len(held) or len(set(held.tolist())) != len(held):
        raise StandInError(f"resident {list(resident)[:8]}: one or more different experts wanted")
    if held.min() < 0 or held.max() >= experts:
        raise StandInError(f"resident {list(resident)[:8]}: {experts} experts exist")
    return held
