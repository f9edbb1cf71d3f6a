"""Ways to fill the slots of a fleet, by name. Pure.

Letters: L MoE layers, E experts per layer, P slots of a layer.

"value" gives every device what is best for itself; "coverage" leaves some slots to the experts with the fewest holders
of this round, "history" to those trained the least over the rounds; "random" is the baseline without any statistics.
"prior" goes by the base's own routing, whatever devices have measured.
"theta" is FedMoE's: a device's slots are a total, and each layer gets as many as its threshold asks for. A program has
its slots fixed, and all of them are filled; so "theta" is for building programs and for simulation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from protocol.manifest import Slot
from server import choose_experts, threshold
from server.choose_experts import Chosen
from server.relevance import Floats


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What a strategy chooses from. See `choose_experts.choose` for the first six.

    Attributes
    ----------
    prior : [L, E], the base's own routing; wanted by "prior" alone
    past : [L, E] trained mass of the rounds before (`coverage.faded`); None: none yet
    alpha : share of a device's slots that "theta" fills; the rest is head-room to grow into
    """

    value: Mapping[str, Floats]
    slots: Mapping[str, Sequence[Sequence[Slot]]]
    top_k: int
    coverage: float
    seed: int
    former: Mapping[str, Chosen] | None = None
    prior: Floats | None = None
    past: Floats | None = None
    alpha: float = 1.0


def by_value(fleet: Fleet) -> dict[str, Chosen]:
    """The most valuable experts of each layer, for each device alone."""
    return _choose(fleet, coverage=0.0, past=None)


def by_coverage(fleet: Fleet) -> dict[str, Chosen]:
    """By value, but for a share of the slots: to the experts with the fewest holders in this round."""
    return _choose(fleet, coverage=fleet.coverage, past=None)


def by_history(fleet: Fleet) -> dict[str, Chosen]:
    """By value, but for a share of the slots: to those trained the least so far, holders of this round included."""
    return _choose(fleet, coverage=fleet.coverage, past=fleet.past)


def by_prior(fleet: Fleet) -> dict[str, Chosen]:
    """As "coverage", by the experts that the base itself uses most: without coverage, the same for all of a size."""
    if fleet.prior is None:
        raise ValueError('strategy "prior" wants Fleet.prior')
    same = dict.fromkeys(fleet.value, fleet.prior)
    return _choose(replace(fleet, value=same), coverage=fleet.coverage, past=None)


def at_random(fleet: Fleet) -> dict[str, Chosen]:
    """Drawn once per device: the seed and the device's name decide, and every round gives the same."""
    chosen: dict[str, Chosen] = {}
    for device in sorted(fleet.value):
        experts = fleet.value[device].shape[1]
        rng = np.random.default_rng(np.random.SeedSequence([fleet.seed, *device.encode()]))
        chosen[device] = [
            [int(e) for e in rng.permutation(experts)[: len(slots)]]
            for slots in fleet.slots[device]
        ]
    return chosen


def by_theta(fleet: Fleet) -> dict[str, Chosen]:
    """The largest share of routing that every layer of a device can keep within its slots in total.

    Values count as shares of routing; what is worth less than nothing counts as nothing.

    Raises
    ------
    threshold.ThresholdError
        A device without room for top_k experts in every layer.
    """
    chosen: dict[str, Chosen] = {}
    for device in sorted(fleet.value):
        p = np.maximum(fleet.value[device], 0.0)
        total = sum(len(slots) for slots in fleet.slots[device])
        kept = threshold.widest(p, np.ones_like(p), total, top_k=fleet.top_k, alpha=fleet.alpha)
        chosen[device] = [list(row) for row in kept.experts]
    return chosen


def _choose(fleet: Fleet, *, coverage: float, past: Floats | None) -> dict[str, Chosen]:
    return choose_experts.choose(
        fleet.value,
        fleet.slots,
        top_k=fleet.top_k,
        coverage=coverage,
        seed=fleet.seed,
        former=fleet.former,
        past=past,
    )


STRATEGIES: dict[str, Callable[[Fleet], dict[str, Chosen]]] = {
    "coverage": by_coverage,
    "history": by_history,
    "prior": by_prior,
    "random": at_random,
    "theta": by_theta,
    "value": by_value,
}
FIXED = tuple(sorted(set(STRATEGIES) - {"theta"}))
"""Strategies for programs, whose slots per layer are fixed."""
