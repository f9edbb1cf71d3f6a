"""How differently the router treats different text. Arrays in, arrays out.

Letters: D domains, L layers, E experts. A profile [L, E] is the mean router probability of each expert per layer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def cosines(first: NDArray[Any], second: NDArray[Any]) -> Floats:
    """Cosine of two profiles in every layer; [L, E] twice -> [L].

    >>> cosines(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[2.0, 0.0], [0.0, 3.0]])).tolist()
    [1.0, 0.0]
    """
    norms = np.linalg.norm(first, axis=-1) * np.linalg.norm(second, axis=-1)
    return np.asarray((first * second).sum(-1) / norms)


def information(profiles: NDArray[Any]) -> Floats:
    """Bits that one routed expert tells about which of D equally likely domains a text is from.

    Parameters
    ----------
    profiles : float array [D, L, E]

    Returns
    -------
    float64 [L], 0 to log2 D

    Examples
    --------
    >>> information(np.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [1.0]
    """
    mean = np.broadcast_to(profiles.mean(0), profiles.shape)
    ratio = np.divide(profiles, mean, out=np.ones_like(profiles), where=profiles > 0)
    return np.asarray((profiles * np.log2(ratio)).sum(-1).mean(0))


def prior(profiles: NDArray[Any]) -> Floats:
    """Mean over the domains, every row normalised to 1; [D, L, E] -> [L, E].

    >>> prior(np.array([[[1.0, 0.0]], [[0.0, 1.0]]])).tolist()
    [[0.5, 0.5]]
    """
    mean = profiles.mean(0)
    return np.asarray(mean / mean.sum(-1, keepdims=True))
