"""Accepted updates -> the next global adapter. Pure: arrays in, arrays out.

    weights      who counts for an expert, and with what share; the rest belongs to the old value
    one_expert   the factors of one expert, by lora_rules and robust
    round_gates  the router rows of one layer, by gate_rules
    rules        which of all this a run uses

Experts are done one after the other, so memory stays at one update plus the running sums; rules that need all holders
at once ("svd", "flex", "stack", the robust ones, diagnostics) hold the factors of one projection of one expert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from server import one_expert, weights
from server.contribution import Contribution, Key
from server.lora_rules import Array
from server.round_gates import RoundGates
from server.rules import Rules


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
            here = one_expert.clipped(adapter, here, projections, rules.clip)
        for key, members in here.items():
            tails[key] = [
                tail
                for projection in projections
                for tail in [one_expert.combine(new, adapter, key, projection, members, rules)]
                if tail is not None
            ]
            if diagnose:
                residual[key], moved[key] = one_expert.bias(adapter, key, projections, members)
    gate = RoundGates.of(adapter, ordered, members_of, rules)
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
