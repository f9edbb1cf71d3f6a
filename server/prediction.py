"""Statistics for a device that cannot profile, from those that did (FedMoE, arXiv 2408.11304, stage 1). Pure.

The best source that there is: devices with the same task, weighted by their data (as printed); else devices whose
statistics agree with the little that is known of this one, weighted by that agreement (ours); else the base's own
routing. Letters: L MoE layers, E experts per layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from server import similarity
from server.similarity import Floats


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A device with statistics [L, E]: how many rows it has, and its task ("": nobody said)."""

    statistics: Floats
    rows: float
    task: str = ""


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Statistics [L, E] and where they come from."""

    statistics: Floats
    source: Literal["task", "similar", "prior"]


def predict(
    peers: Mapping[str, Peer],
    prior: Floats,
    *,
    task: str | None = None,
    partial: Floats | None = None,
    known: NDArray[np.bool_] | None = None,
    count: int = 3,
) -> Predicted:
    """Predict the statistics of one device.

    Parameters
    ----------
    peers : the devices with statistics
    prior : [L, E], the base's own routing
    task : the device's; None when it is not known
    partial, known : [L, E], shares that are known of the device itself, and where
    count : similar devices that are asked when no peer has the same task

    Returns
    -------
    Predicted
        What is known is kept. With `partial`, the experts that are not known share what it leaves of the row's sum 1.

    Raises
    ------
    ValueError
        `partial` without `known`, or the other way round.

    Examples
    --------
    >>> prior = np.array([[0.5, 0.5]])
    >>> peers = {"a": Peer(statistics=np.array([[0.9, 0.1]]), rows=30, task="news"),
    ...          "b": Peer(statistics=np.array([[0.5, 0.5]]), rows=10, task="news"),
    ...          "c": Peer(statistics=np.array([[0.0, 1.0]]), rows=99, task="code")}
    >>> predict(peers, prior, task="news").statistics.round(6).tolist()
    [[0.8, 0.2]]
    >>> predict(peers, prior, task="poems").source
    'prior'
    """
    if (partial is None) != (known is None):
        raise ValueError("partial statistics and where they are known: both or neither wanted")
    alike = {name: peer for name, peer in peers.items() if task is not None and peer.task == task}
    source: Literal["task", "similar", "prior"]
    if alike:
        matrices = [peer.statistics for peer in alike.values()]
        # Values can be negative (expert_values), rows cannot: only the weights have to be.
        found = similarity.recommended(matrices, [peer.rows for peer in alike.values()])
        source = "task"
    elif peers and partial is not None and known is not None and known.any():
        there = {name: peer.statistics * known for name, peer in peers.items()}
        near = similarity.similar(partial * known, there, count)
        found = similarity.recommended([peers[d].statistics for d in near], list(near.values()))
        source = "similar"
    else:
        found, source = np.array(prior, np.float64), "prior"
    if partial is not None and known is not None:
        found = _filled(found, partial, known)
    return Predicted(statistics=found, source=source)


def _filled(found: Floats, partial: Floats, known: NDArray[np.bool_]) -> Floats:
    """`partial` where it is known; elsewhere `found`, scaled so that rows sum to 1."""
    left = np.maximum(1 - (partial * known).sum(-1, keepdims=True), 0.0)
    rest = np.where(known, 0.0, np.maximum(found, 0.0))
    total = rest.sum(-1, keepdims=True)
    even = ~known / np.maximum((~known).sum(-1, keepdims=True), 1)
    share = np.divide(rest, total, out=np.asarray(even, np.float64), where=total > 0)
    return np.where(known, partial, left * share)


def complete(
    known: Mapping[str, Floats],
    devices: Sequence[str],
    rows: Mapping[str, float],
    prior: Floats,
    *,
    initial: str,
    seed: int,
) -> dict[str, Floats]:
    """Statistics of all devices of a run; they have one task in common.

    Parameters
    ----------
    known : device -> [L, E], of those that have reported
    devices : who needs them
    rows : device -> rows of data
    prior : [L, E]
    initial : where those of a device come from that never reported: "profile" asks its peers, "prior" the base,
        "random" draws them from `seed` and the device's name, the same in every round

    Returns
    -------
    device -> [L, E], of `known` and `devices`

    Examples
    --------
    >>> found = complete({"a": np.array([[0.9, 0.1]])}, ["a", "b"], {"a": 7}, np.array([[0.5, 0.5]]),
    ...                  initial="profile", seed=0)
    >>> found["b"].tolist()
    [[0.9, 0.1]]
    """
    peers = {d: Peer(statistics=v, rows=rows.get(d, 0)) for d, v in known.items()}
    found = dict(known)
    for device in sorted(set(devices) - set(known)):
        if initial == "random":
            rng = np.random.default_rng([seed, *device.encode()])
            found[device] = rng.dirichlet(np.ones(prior.shape[1]), prior.shape[0])
        else:
            task = "" if initial == "profile" else None
            found[device] = predict(peers, prior, task=task).statistics
    return found
