"""How router rows are combined, and how well gates agree. Pure.

Letters: E experts, d hidden size. A row is the change against the base, float32 [d]; a device sends the rows of the
experts it holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from protocol import names
from server import robust
from server.contribution import Contribution
from server.lora_rules import Array, Floats
from server.rules import Robust


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


def sent_rows(c: Contribution) -> dict[int, list[int]]:
    """Layer -> experts whose router row the device sent.

    >>> sent_rows(Contribution(device="a", tensors={"layers.3.router.5": np.zeros(2)}, trained_tokens={}))
    {3: [5]}
    """
    found: dict[int, list[int]] = {}
    for key in c.tensors:
        name = names.parse(key)
        if name is not None and name.projection is None:
            found.setdefault(name.layer, []).append(name.expert)
    return found


def changes(
    adapter: Mapping[str, Array], layer: int, c: Contribution, experts: Iterable[int]
) -> dict[int, Floats]:
    """Expert -> change of its router row since the lease, [d]."""
    keys = {e: names.router_row(layer, e) for e in experts}
    return {e: c.tensors[key].astype(np.float64) - adapter[key] for e, key in keys.items()}


def combine(
    adapter: Mapping[str, Array],
    layer: int,
    moved: Iterable[tuple[Mapping[int, Floats], Mapping[int, float]]],
    *,
    clip: float = 0.0,
    kind: Robust = "mean",
) -> dict[str, Array]:
    """New router rows of a layer.

    Parameters
    ----------
    moved : per device (expert -> change [d], expert -> share); consumed once. Without `clip` and under "mean" memory
        stays at one device's rows and the sums
    clip : see `robust.clip_factors`
    kind : see `robust.robust_mean`

    Returns
    -------
    name -> row, of the experts in which anyone has a share
    """
    if clip > 0 or kind != "mean":
        held: dict[int, list[tuple[Floats, float]]] = {}
        for rows, share_of in moved:
            for e in rows:
                if share_of.get(e, 0.0) > 0:
                    held.setdefault(e, []).append((rows[e], share_of[e]))
        return {
            names.router_row(layer, e): _guarded(
                adapter[names.router_row(layer, e)], held[e], clip, kind
            )
            for e in sorted(held)
        }
    sums: dict[int, Floats] = {}
    for rows, share_of in moved:
        for e, row in rows.items():
            if share_of.get(e, 0.0) > 0:
                sums[e] = sums.get(e, 0.0) + share_of[e] * row
    new = {names.router_row(layer, e): total for e, total in sorted(sums.items())}
    return {key: (adapter[key] + total).astype(np.float32) for key, total in new.items()}


def _guarded(old: Array, held: Sequence[tuple[Floats, float]], clip: float, kind: Robust) -> Array:
    factors = robust.clip_factors([float(np.linalg.norm(row)) for row, _ in held], clip)
    values = [(old + f * row, share) for f, (row, share) in zip(factors, held, strict=True)]
    return robust.robust_mean(old, values, kind if len(held) >= robust.ENOUGH else "mean")


def importance_shares(
    layer: int, contributions: Sequence[Contribution], experts: Mapping[str, Iterable[int]]
) -> tuple[dict[str, float], dict[str, float]]:
    """One weight per device for a whole gate, and how much of the union of experts it uses.

    p_c(e) = u_c(e) s_c(e); alpha(c) = sum of p_c over its experts / |S_global| (HFedMoE, arXiv 2601.00583, eq 18-20).
    As printed, alpha does not sum to 1 and (21) would rescale the gate: here it is divided by its sum.

    Parameters
    ----------
    experts : device -> S_c, the experts of the layer that it uses

    Returns
    -------
    alpha : device -> share; sums to 1, or all 0 where nobody uses anything
    consistency : device -> r(c) = |S_c| / |S_global|, 0 where the union is empty

    Examples
    --------
    >>> a = Contribution(device="a", tensors={}, trained_tokens={}, usage={(0, 1): 0.5}, importance={(0, 1): 0.6})
    >>> b = Contribution(device="b", tensors={}, trained_tokens={}, usage={(0, 2): 0.5}, importance={(0, 2): 0.2})
    >>> alpha, r = importance_shares(0, [a, b], {"a": [1], "b": [2]})
    >>> {d: round(v, 6) for d, v in alpha.items()}, r
    ({'a': 0.75, 'b': 0.25}, {'a': 0.5, 'b': 0.5})
    """
    used = {c.device: set(experts.get(c.device, ())) for c in contributions}
    union = set().union(*used.values())
    raw = {
        c.device: sum(
            c.usage.get((layer, e), 0.0) * c.importance.get((layer, e), 0.0)
            for e in sorted(used[c.device])
        )
        for c in contributions
    }
    total = sum(raw.values())
    alpha = {d: p / total if total > 0 else 0.0 for d, p in raw.items()}
    return alpha, {d: len(s) / len(union) if union else 0.0 for d, s in used.items()}


def drift(ours: NDArray[np.floating], theirs: NDArray[np.floating]) -> float:
    """Mean KL(ours || theirs), in nats, of two gates over the same experts.

    Without tokens at hand the gates are asked about the d coordinate directions, with the norm sqrt(d) that an
    RMS-normalised input has. A shift common to all rows does not count.

    Parameters
    ----------
    ours, theirs : router rows [n, d] of the same n experts

    Examples
    --------
    >>> drift(np.array([[1.0], [2.0]]), np.array([[6.0], [7.0]]))
    0.0
    """
    p, q = (_log_softmax(rows * np.sqrt(rows.shape[-1])) for rows in (ours, theirs))
    return float(np.maximum((np.exp(p) * (p - q)).sum(0), 0.0).mean())


def _log_softmax(logits: NDArray[np.floating]) -> Floats:
    shifted = logits.astype(np.float64) - logits.max(0)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(0)))
