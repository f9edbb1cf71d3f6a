"""One accepted update as aggregation sees it: from a file's statistics or from arrays in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Key = tuple[int, int]
"""(layer id, expert id), both global."""
PerExpert = Mapping[Key, float]


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One accepted update.

    Attributes
    ----------
    device : its name; the order of names is the order of sums, so results do not depend on the order of updates
    tensors : global name -> new value, float32. Factors are [r, I] and [O, r] with r <= R, each expert may have its own
        r; router rows [d] as the change against the base. A factor that is missing is unchanged. Any mapping will do:
        it is read one expert at a time, so it may read files lazily
    trained_tokens : n_k: tokens that trained each expert; experts that none trained may be left out
    tokens : N_k: valid tokens trained on; counts as at least the largest n_k
    rows : training rows of the device
    usage : u_k(e): mean router probability of each expert over the device's tokens (HFedMoE eq 16)
    importance : s_b(e): blend of mean and peak of it (HFedMoE eq 5)
    age : rounds since the version that it was trained from
    """

    device: str
    tensors: Mapping[str, NDArray[np.float32]]
    trained_tokens: PerExpert
    tokens: float = 0.0
    rows: float = 0.0
    usage: PerExpert = field(default_factory=dict)
    importance: PerExpert = field(default_factory=dict)
    age: int = 0


def from_stats(
    device: str,
    tensors: Mapping[str, NDArray[np.float32]],
    stats: Mapping[str, NDArray[np.floating]],
    layers: Sequence[int],
    *,
    top_k: int,
    rows: float = 0.0,
    age: int = 0,
    blend: float = 0.5,
) -> Contribution:
    """Contribution from the statistics of an update.

    Parameters
    ----------
    stats : `protocol.update.STATS`, each [L, E]; "trained_tokens" and "mass" are used, and "peak" where it is there
    layers : ids of the L MoE layers
    top_k : experts per token; a layer whose places all gave gradients tells how many tokens there were
    blend : lambda of HFedMoE eq 5, see `Rules.gate_blend`

    Examples
    --------
    >>> stats = {"trained_tokens": np.array([[6.0, 0, 2]]), "mass": np.array([[3.0, 1, 0]])}
    >>> c = from_stats("a", {}, stats, [4], top_k=2)
    >>> c.trained_tokens, c.tokens, c.usage[4, 0]
    ({(4, 0): 6.0, (4, 2): 2.0}, 4.0, 0.75)
    """
    trained = np.asarray(stats["trained_tokens"], np.float64)
    mass = np.asarray(stats["mass"], np.float64)
    usage = mass / np.maximum(mass.sum(-1, keepdims=True), 1e-12)
    importance = usage
    if "peak" in stats:
        importance = blend * usage + (1 - blend) * np.asarray(stats["peak"], np.float64)
    return Contribution(
        device=device,
        tensors=tensors,
        trained_tokens=_per_expert(trained, layers),
        tokens=float(trained.sum(-1).max(initial=0.0)) / top_k,
        rows=rows,
        usage=_per_expert(usage, layers),
        importance=_per_expert(importance, layers),
        age=age,
    )


def _per_expert(values: NDArray[np.float64], layers: Sequence[int]) -> dict[Key, float]:
    places = zip(*np.nonzero(values), strict=True)
    return {(layers[i], int(e)): float(values[i, e]) for i, e in places}
