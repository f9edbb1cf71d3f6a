"""Which devices use the experts alike, and what those recommend (FedMoE, arXiv 2408.11304, eq. 4 to 6). Pure.

Letters: L MoE layers, E experts per layer, D devices. An activation matrix is [L, E]: for each expert its share of what
the layer's router sent out on the device's own rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def activation(stats: Mapping[str, NDArray[np.float32]]) -> Floats:
    """Activation matrix of one device, from the routing statistics of its update.

    FedMoE counts how often an expert is active. Here an active expert counts with its router probability, which is the
    same where the router is sure; a layer without any token is uniform.

    Parameters
    ----------
    stats : as in `protocol.update.STATS`; only "top" [L, E] is read

    Returns
    -------
    [L, E], rows sum to 1

    Examples
    --------
    >>> activation({"top": np.array([[3.0, 1.0], [0.0, 0.0]], np.float32)}).tolist()
    [[0.75, 0.25], [0.5, 0.5]]
    """
    top = np.asarray(stats["top"], np.float64)
    total = top.sum(-1, keepdims=True)
    share = np.divide(top, total, out=np.full_like(top, 1 / top.shape[-1]), where=total > 0)
    return np.asarray(share)


def cosine(a: Floats, b: Floats) -> float:
    """Cosine of two flattened matrices (eq. 4); 0 where one of them is all zeros.

    The paper prints the number of experts as the upper bound of the sum over layers; it is the number of layers.

    Examples
    --------
    >>> cosine(np.array([[3.0, 0.0], [0.0, 4.0]]), np.array([[0.0, 0.0], [0.0, 1.0]]))
    0.8
    """
    length = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(np.vdot(a, b)) / length if length > 0 else 0.0


def similar(own: Floats, others: Mapping[str, Floats], count: int) -> dict[str, float]:
    """The `count` devices with the largest cosine to `own` (eq. 5), the most similar first.

    Parameters
    ----------
    own : [L, E]
    others : device -> [L, E], without the device itself

    Returns
    -------
    device -> cosine; of equal ones the first name wins

    Examples
    --------
    >>> a, b = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    >>> similar(a, {"x": b, "y": a, "z": a}, 2)
    {'y': 1.0, 'z': 1.0}
    """
    cosines = {device: cosine(own, others[device]) for device in sorted(others)}
    nearest = sorted(cosines, key=lambda device: -cosines[device])[:count]
    return {device: cosines[device] for device in nearest}


def recommended(matrices: Sequence[Floats], weights: Sequence[float]) -> Floats:
    """Mean of the similar devices' activation, weighted by similarity (eq. 6).

    Parameters
    ----------
    matrices : D of [L, E], at least one
    weights : D; what is negative counts as 0, and if nothing is left, all count the same

    Returns
    -------
    [L, E]

    Examples
    --------
    >>> recommended([np.array([[0.8, 0.2]]), np.array([[0.4, 0.6]])], [0.75, 0.25]).round(6).tolist()
    [[0.7, 0.3]]
    """
    w = np.maximum(np.asarray(weights, np.float64), 0.0)
    if w.sum() <= 0:
        w = np.ones(len(matrices))
    return np.asarray(np.tensordot(w / w.sum(), np.stack(list(matrices)), axes=1))
