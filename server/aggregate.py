"""Accepted updates -> the next global adapter. Pure: arrays in, arrays out.

    weights      who counts for an expert, and with what share; the rest belongs to the old value
    lora_rules   the factors of one expert and projection        gate_rules   the router rows of one layer
    robust       what to do about devices that disagree or lie   rules        which of all this a run uses

Experts are done one after the other, so memory stays at one update plus the running sums; rules that need all holders
at once ("svd", "flex", "stack", the robust ones, diagnostics) hold the factors of one projection of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from protocol import names
from server import gate_rules, lora_rules, robust, stacking, weights
from server.contribution import Contribution, Key
from server.lora_rules import Array, Factors, Floats
from server.rules import Rules
from server.weights import Members

# An activation stands between the factors of an adapter expert: they are averaged one by one.
NOT_A_PRODUCT = ("adapter",)
PRODUCTS = ("svd", "flex", "stack")
# Factors that a rule lets in; what else arrives is ignored.
SHARED = {"ffa": ("lora_B",), "fedsa": ("lora_A",)}


@dataclass(frozen=True, kw_only=True)
class Aggregated:
    """The new adapter, and what the history says about it.

    Attributes
    ----------
    prior_mass : a_0 of the round
    tail_mean, tail_max : share of the squared product beyond rank R that was cut off, over experts and projections
    tail : the largest of an expert
    residual : norm of what plain factor averaging would have got wrong in an expert, see `lora_rules.bias`
    moved : norm of the average change of its products
    holders : devices that counted for it
    gate_drift : device -> mean KL of the new gate against its own, over the experts it holds, nats
    consistency : device -> r(c), the share of all used experts that it uses (HFedMoE eq 18), mean of the layers
    alpha : device -> its weight in the importance gate (eq 20, normalised), mean of the layers
    """

    adapter: dict[str, Array]
    prior_mass: float
    tail_mean: float = 0.0
    tail_max: float = 0.0
    tail: dict[Key, float] = field(default_factory=dict)
    residual: dict[Key, float] = field(default_factory=dict)
    moved: dict[Key, float] = field(default_factory=dict)
    holders: dict[Key, int] = field(default_factory=dict)
    gate_drift: dict[str, float] = field(default_factory=dict)
    consistency: dict[str, float] = field(default_factory=dict)
    alpha: dict[str, float] = field(default_factory=dict)

    @property
    def bias(self) -> dict[Key, float]:
        """Residual as a share of the change, of the experts that changed."""
        return {k: r / self.moved[k] for k, r in self.residual.items() if self.moved[k] > 0}


def aggregate(
    adapter: Mapping[str, Array],
    contributions: Sequence[Contribution],
    projections: Sequence[str],
    rules: Rules | None = None,
    *,
    routers: Mapping[int, NDArray[np.floating]] | None = None,
    diagnose: bool = True,
) -> Aggregated:
    """Fold the contributions of one round into the adapter.

    Parameters
    ----------
    adapter : all global names -> float32
    contributions : any order; the result does not depend on it
    projections : of an expert of this base
    rules : default `Rules()`
    routers : layer -> rows of the base [E, d], for the drift of the gates; without them that of the changes is given
    diagnose : also find residuals and drifts, about as much work again

    Returns
    -------
    Aggregated
        Experts and rows that nobody trained keep the very same arrays, and so do factors that nobody sent. Under
        "stack" the factors of trained experts have as many rows as the ranks sum to, see `stacking`.
    """
    rules = rules or Rules()
    ordered = sorted(contributions, key=lambda c: c.device)
    members_of, prior_mass = weights.shares(ordered, rules)
    new = dict(adapter)
    tails: dict[Key, list[float]] = {}
    residual: dict[Key, float] = {}
    moved: dict[Key, float] = {}
    for layer in sorted({layer for layer, _ in members_of}):
        here = {key: members for key, members in members_of.items() if key[0] == layer}
        if rules.clip > 0:
            here = _clipped(adapter, here, projections, rules.clip)
        for key, members in here.items():
            tails[key] = [
                tail
                for projection in projections
                for tail in [_projection(new, adapter, key, projection, members, rules)]
                if tail is not None
            ]
            if diagnose:
                residual[key], moved[key] = _bias(adapter, key, projections, members)
    gate = _Gate.of(adapter, ordered, members_of, rules)
    for layer in gate.layers:
        new |= gate.rows(layer)
    flat = [tail for key in tails for tail in tails[key]]
    return Aggregated(
        adapter=new,
        prior_mass=prior_mass,
        tail_mean=float(np.mean(flat)) if flat else 0.0,
        tail_max=max(flat, default=0.0),
        tail={key: max(found) for key, found in tails.items() if found},
        residual=residual,
        moved=moved,
        holders={key: len(members) for key, members in members_of.items()},
        gate_drift=gate.drift(new, routers or {}) if diagnose else {},
        consistency=gate.consistency,
        alpha=gate.alpha,
    )


def _keys(key: Key, projection: str) -> tuple[str, str]:
    a, b = (names.lora(*key, projection, factor) for factor in names.FACTORS)
    return a, b


def _projection(
    new: dict[str, Array],
    adapter: Mapping[str, Array],
    key: Key,
    projection: str,
    members: Members,
    rules: Rules,
) -> float | None:
    """Set the factors of one projection of one expert; the energy that was cut off, if it was a product."""
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


def _bias(
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


def _clipped(
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
    clipped: dict[Key, Members] = {}
    for key, members in members_of.items():
        factors = robust.clip_factors(norms[key], times, fallback=middle)
        clipped[key] = [(c, f * w) for f, (c, w) in zip(factors, members, strict=True)]
    return clipped


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


@dataclass(frozen=True, kw_only=True)
class _Gate:
    """The router rows of a round."""

    adapter: Mapping[str, Array]
    contributions: Sequence[Contribution]
    rules: Rules
    sent: Mapping[str, Mapping[int, Sequence[int]]]  # device -> layer -> experts
    shares: Mapping[str, Mapping[int, Mapping[int, float]]]  # device -> layer -> expert -> share
    layers: Sequence[int]
    alphas: Mapping[int, Mapping[str, float]]
    consistency: dict[str, float]

    @classmethod
    def of(
        cls,
        adapter: Mapping[str, Array],
        contributions: Sequence[Contribution],
        members_of: Mapping[Key, Members],
        rules: Rules,
    ) -> _Gate:
        shares: dict[str, dict[int, dict[int, float]]] = {c.device: {} for c in contributions}
        for (layer, expert), members in members_of.items():
            for c, w in members:
                shares[c.device].setdefault(layer, {})[expert] = w
        layers = sorted({layer for layer, _ in members_of})
        alphas, seen = {}, {}
        for layer in layers:
            used = {device: of.get(layer, {}) for device, of in shares.items()}
            alphas[layer], seen[layer] = gate_rules.importance_shares(layer, contributions, used)
        return cls(
            adapter=adapter,
            contributions=contributions,
            rules=rules,
            sent={c.device: gate_rules.sent_rows(c) for c in contributions},
            shares=shares,
            layers=layers,
            alphas=alphas,
            consistency=_mean_of_layers(seen),
        )

    @property
    def alpha(self) -> dict[str, float]:
        return _mean_of_layers(self.alphas)

    def _shares(self, layer: int, c: Contribution) -> Mapping[int, float]:
        """Expert -> share of the device in its row."""
        sent = self.sent[c.device].get(layer, ())
        if self.rules.gate == "importance":
            return dict.fromkeys(sent, self.alphas[layer][c.device])
        if self.rules.gate == "mean":
            total = sum(weights.data_size(other, self.rules) for other in self.contributions)
            size = weights.data_size(c, self.rules)
            return dict.fromkeys(sent, size / total if total > 0 else 0.0)
        return self.shares[c.device].get(layer, {})

    def rows(self, layer: int) -> dict[str, Array]:
        """New rows of a layer."""
        if self.rules.gate == "frozen":
            return {}
        centre = gate_rules.centred if self.rules.gate == "rows" else dict
        moved = (
            (centre(self._changes(layer, c)), self._shares(layer, c)) for c in self.contributions
        )
        return gate_rules.combine(
            self.adapter, layer, moved, clip=self.rules.clip, kind=self.rules.robust
        )

    def _changes(self, layer: int, c: Contribution) -> dict[int, Floats]:
        return gate_rules.changes(self.adapter, layer, c, self.sent[c.device].get(layer, ()))

    def drift(
        self, new: Mapping[str, Array], routers: Mapping[int, NDArray[np.floating]]
    ) -> dict[str, float]:
        """Device -> mean KL of the new gate against its own."""
        found: dict[str, float] = {}
        for c in self.contributions:
            drifts = []
            for layer, experts in self.sent[c.device].items():
                keys = [names.router_row(layer, e) for e in experts]
                base = routers[layer][list(experts)] if layer in routers else 0.0
                ours = np.stack([new[k] for k in keys]) + base
                theirs = np.stack([c.tensors[k] for k in keys]) + base
                drifts.append(gate_rules.drift(ours, theirs))
            if drifts:
                found[c.device] = float(np.mean(drifts))
        return found


def _mean_of_layers(values: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    devices = sorted({device for of in values.values() for device in of})
    return {d: float(np.mean([of[d] for of in values.values()])) for d in devices}
