"""The router rows of a round: whose changes reach them, with what share, and how far gates are apart. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protocol import names
from server import gate_rules, weights
from server.contribution import Contribution, Key
from server.lora_rules import Array, Floats
from server.rules import Rules
from server.weights import Members


@dataclass(frozen=True, kw_only=True)
class RoundGates:
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
    ) -> RoundGates:
        """Find who has what share in which row.

        Parameters
        ----------
        adapter : as it was when the leases were made
        contributions : of the round, sorted by device
        members_of : (layer, expert) -> its holders with their shares
        """
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
        """Device -> its weight in the importance gate, mean of the layers."""
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
        """Device -> mean KL of the new gate against its own, over the rows it sent, in nats.

        `routers` : layer -> rows of the base, [E, d]; a layer without them is compared by its changes alone.
        """
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
