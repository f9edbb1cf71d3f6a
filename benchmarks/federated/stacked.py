"""FLoRA in the simulation (`lora="stack"`): what a round learnt becomes a dense change beside the base's weights.

A running server refuses the rule, because its experts are 4-bit blobs (`server.stacking`). Here every session adds the
change to its dequantised weights, so that clients train and are measured on base + change, with fresh factors each
round. What is sent goes by the downlink of the method, and the server absorbs it as it is sent, so that all have the
same model; that a client which is sent the change as a whole gets it in float16 is counted, not simulated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from edge.routed_torch import RoutedBackend, RoutedSession
from edge.session import Artifact, Resident
from protocol import names, tensors
from server import stacking
from server.aggregate import Aggregated
from server.contribution import Key
from server.stacking import Dense

Adapter = dict[str, NDArray[np.float32]]
CHANGE_BYTES = 2  # of a weight's dense change, float16


class DenseBackend(RoutedBackend):
    """The fast torch backend with a dense change on top of the experts of every session that it opens."""

    def __init__(self, dense: Dense, device: str = "cpu") -> None:
        """`dense` is read whenever a session opens."""
        super().__init__(device)
        self.dense = dense

    def _open(self, artifact: Artifact, resident: Resident) -> RoutedSession:
        session = super()._open(artifact, resident)
        for layer, ids in resident.items():
            # Stacked for this session alone: the body's own experts stay as they are.
            frozen = session.body.blocks[layer].frozen
            for weights, projection in zip(frozen, ("gate_up", "down"), strict=True):
                for slot, expert in enumerate(ids):
                    if (change := self.dense.get((layer, expert, projection))) is not None:
                        weights[slot] += torch.from_numpy(change).to(weights.device)
        return session


@dataclass
class Stacks:
    """What the server keeps of the rounds so far, and which of it each client has."""

    narrow: bool = False  # float16 on the way down
    dense: Dense = field(default_factory=dict)
    sizes: dict[Key, dict[int, int]] = field(default_factory=dict)  # round -> bytes of the stack
    known: dict[str, dict[Key, int]] = field(default_factory=dict)  # up to which round

    def absorb(
        self, folded: Aggregated, projections: Sequence[str], *, rank: int, round: int
    ) -> Adapter:
        """Move the products of a round into `dense`; returns the adapter of the next one, with fresh factors.

        Parameters
        ----------
        folded : of `aggregate` under "stack"
        """
        new = dict(folded.adapter)
        for layer, expert in folded.holders:
            keys = [names.lora(layer, expert, p, f) for p in projections for f in names.FACTORS]
            stack = {key: new[key] for key in keys}
            if self.narrow:
                small = tensors.narrowed(stack)
                size, stack = len(tensors.encode(small)), tensors.widened(small)
            else:
                size = len(tensors.encode(stack))
            new |= stack
            self.sizes.setdefault((layer, expert), {})[round] = size
        return stacking.absorb(new, folded.holders, projections, self.dense, rank=rank, round=round)

    def sent(self, client: str, wanted: Iterable[Key]) -> int:
        """Bytes of changes that a client lacks for the experts of its lease; from then on it has them.

        For each expert the smaller of the stacks of all rounds since the client last held it, and the whole change as
        float16. A client keeps the change of an expert that it no longer holds, as it keeps the expert itself.
        """
        known, total = self.known.setdefault(client, {}), 0
        for key in wanted:
            rounds = self.sizes.get(key)
            if not rounds:
                continue
            missed = sum(size for round, size in rounds.items() if round > known.get(key, 0))
            total += min(missed, self._dense_bytes(key))
            known[key] = max(rounds)
        return total

    def _dense_bytes(self, key: Key) -> int:
        return sum(
            CHANGE_BYTES * change.size for place, change in self.dense.items() if place[:2] == key
        )


def without_factors(part: Mapping[str, NDArray[np.float32]]) -> Adapter:
    """What of a lease is sent: fresh factors are drawn on the device, from their names and the round."""
    kept = {}
    for name, value in part.items():
        parsed = names.parse(name)
        if parsed is None or parsed.factor is None:
            kept[name] = value
    return kept
