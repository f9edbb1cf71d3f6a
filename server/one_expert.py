"""The factors of one expert in one round: what its holders sent -> what the adapter has next. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from protocol import names
from server import lora_rules, robust, stacking
from server.contribution import Contribution, Key
from server.lora_rules import Array, Factors, Floats
from server.rules import Rules
from server.weights import Members

# An activation stands between the factors of an adapter expert: they are averaged one by one.
NOT_A_PRODUCT = ("adapter",)
PRODUCTS = ("svd", "flex", "stack")
# Factors that a rule lets in; what else arrives is ignored.
SHARED = {"ffa": ("lora_B",), "fedsa": ("lora_A",)}


def _keys(key: Key, projection: str) -> tuple[str, str]:
    a, b = (names.lora(*key, projection, factor) for factor in names.FACTORS)
    return a, b


def combine(
    new: dict[str, Array],
    adapter: Mapping[str, Array],
    key: Key,
    projection: str,
    members: Members,
    rules: Rules,
) -> float | None:
    """Set the factors of one projection of one expert in `new`.

    Parameters
    ----------
    new : the next adapter, changed in place; factors that nobody sent stay
    adapter : as it was when the leases were made
    key : (layer, expert)
    members : its holders with their shares

    Returns
    -------
    The share of the squared product that was cut off, None where no product was formed.
    """
    shared = SHARED.get(rules.lora, names.FACTORS)
    key_a, key_b = _keys(key, projection)
    sent = [
        name
        for name, factor in zip((key_a, key_b), names.FACTORS, strict=True)
        if factor in shared and any(name in c.tensors for c, _ in members)
    ]
    if not sent:
        return None
    if rules.copy_single and len(members) == 1:
        for name in sent:
            new[name] = _copied(adapter[name], members[0][0].tensors[name])
        return None
    damp = {name: _damping(adapter[name], name, members, rules) for name in sent}
    guarded = rules.robust != "mean" and len(members) >= robust.ENOUGH
    product = rules.lora in PRODUCTS and projection not in NOT_A_PRODUCT
    if guarded or not product:
        for name in sent:
            old = adapter[name]
            values = (
                (_damped(old, c.tensors[name], damp[name]), w)
                for c, w in members
                if name in c.tensors
            )
            if guarded:
                new[name] = robust.robust_mean(old, list(values), rules.robust)
            else:
                new[name] = lora_rules.mean(old, values)
        if not product or rules.lora == "stack":
            return None
        # Devices of low rank are given the first rows: they have to be the best ones.
        best_a, best_b, tail = lora_rules.reproject([new[key_b]], [new[key_a]], len(new[key_a]))
        new[key_a], new[key_b] = best_a.astype(np.float32), best_b.astype(np.float32)
        return tail
    old_a, old_b = adapter[key_a], adapter[key_b]
    holders: list[Factors] = []
    for c, w in members:
        a, b = _both(adapter, c, key_a, key_b)
        holders.append((_damped(old_a, a, damp.get(key_a)), _damped(old_b, b, damp.get(key_b)), w))
    if rules.lora == "stack":
        new[key_a], new[key_b] = stacking.stack(old_a, old_b, holders)
        return 0.0
    new[key_a], new[key_b], tail = lora_rules.product(
        old_a, old_b, holders, tail_vote=rules.lora == "svd"
    )
    return tail


def _both(
    adapter: Mapping[str, Array], c: Contribution, key_a: str, key_b: str
) -> tuple[Array, Array]:
    """Both factors of a holder; the one that it did not send is the adapter's, at its rank."""
    a, b = c.tensors.get(key_a), c.tensors.get(key_b)
    if a is None:
        a = adapter[key_a] if b is None else adapter[key_a][: b.shape[1]]
    if b is None:
        b = adapter[key_b][:, : a.shape[0]]
    return a, b


def _copied(old: Array, value: Array) -> Array:
    if value.shape == old.shape:
        return np.array(value, np.float32)
    new = np.array(old)
    new[tuple(slice(n) for n in value.shape)] = value
    return new


def _damping(old: Array, name: str, members: Members, rules: Rules) -> Floats | None:
    if rules.sign_conflict == "off" or len(members) < 2:
        return None
    changes = (
        (c.tensors[name].astype(np.float64) - _part(old, c.tensors[name]), w)
        for c, w in members
        if name in c.tensors
    )
    return robust.damping(robust.consensus(changes, old.shape), rules.sign_conflict)


def _part(old: NDArray[np.floating], value: NDArray[np.floating]) -> NDArray[np.floating]:
    return old[tuple(slice(n) for n in value.shape)]


def _damped(old: Array, value: NDArray[np.floating], damp: Floats | None) -> NDArray[np.floating]:
    if damp is None:
        return value
    start = _part(old, value)
    return start + _part(damp, value) * (value - start)


def bias(
    adapter: Mapping[str, Array], key: Key, projections: Sequence[str], members: Members
) -> tuple[float, float]:
    """Norms over the projections of an expert, see `lora_rules.bias`."""
    found = []
    for projection in projections:
        if projection not in NOT_A_PRODUCT:
            key_a, key_b = _keys(key, projection)
            holders = [(*_both(adapter, c, key_a, key_b), w) for c, w in members]
            found.append(lora_rules.bias(adapter[key_a], adapter[key_b], holders))
    residual, moved = np.sqrt(np.square(found).sum(0)) if found else (0.0, 0.0)
    return float(residual), float(moved)


def clipped(
    adapter: Mapping[str, Array],
    members_of: Mapping[Key, Members],
    projections: Sequence[str],
    times: float,
) -> dict[Key, Members]:
    """Members of the experts of a layer, with the share of what is too large cut down.

    To scale a change down is to give part of its share to the old value. Where fewer than 3 hold an expert, the median
    of all changes in the layer is the measure.
    """
    norms = {
        key: [_change_norm(adapter, key, projections, c) for c, _ in members]
        for key, members in members_of.items()
    }
    flat = [norm for key in norms for norm in norms[key]]
    middle = float(np.median(flat)) if len(flat) >= robust.ENOUGH else 0.0
    smaller: dict[Key, Members] = {}
    for key, members in members_of.items():
        factors = robust.clip_factors(norms[key], times, fallback=middle)
        smaller[key] = [(c, f * w) for f, (c, w) in zip(factors, members, strict=True)]
    return smaller


def _change_norm(
    adapter: Mapping[str, Array], key: Key, projections: Sequence[str], c: Contribution
) -> float:
    squared = 0.0
    for projection in projections:
        key_a, key_b = _keys(key, projection)
        a, b = _both(adapter, c, key_a, key_b)
        old_a, old_b = _part(adapter[key_a], a), _part(adapter[key_b], b)
        if projection in NOT_A_PRODUCT:
            squared += float(np.square(a - old_a).sum() + np.square(b - old_b).sum())
        else:
            squared += lora_rules.product_norm([b, -old_b], [a, old_a]) ** 2
    return float(np.sqrt(squared))
