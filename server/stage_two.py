"""FedMoE's stage 2 in a running server: sub-models from the store, through the pure parts, and back as text to store.

`submodels` and `structure` decide; `turns` puts what comes back into the transaction of the round.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from protocol.manifest import BaseIndex, Shape
from server import structure, submodels
from server.choose_experts import Chosen
from server.config import Config
from server.rounds import Work
from server.similarity import Floats
from server.store import LeaseRow, StateError, Store
from server.structure import Change, Limits, Rules, State, StructureError

log = logging.getLogger(__name__)


class StageTwo:
    """The sub-models of one run.

    Raises
    ------
    StateError
        A stored sub-model that cannot be read.
    """

    def __init__(self, config: Config, base: BaseIndex, store: Store) -> None:
        self._config, self._base, self._store = config, base, store
        self.states()

    def states(self) -> dict[str, State]:
        """Device -> its sub-model, of the devices that have one."""
        layers, experts = len(self._base.moe_layers), self._base.num_experts
        found = {}
        for device, text in self._store.structures().items():
            try:
                found[device] = structure.from_json(text, layers, experts)
            except StructureError as error:
                raise StateError(f"{self._config.state}: device {device}: {error}") from error
        return found

    def _room(self, shape: Shape) -> Limits:
        return submodels.limits(shape, self._base.top_k, self._base.num_experts)

    def begun(
        self, work: Work, chosen: Mapping[str, Chosen], shapes: Mapping[str, Shape]
    ) -> dict[str, State]:
        """Sub-models of a round's devices; training begins one for a device that has none that fits."""
        if self._config.structure == "none":
            return {}
        known, found = self.states(), {}
        for device, layers in chosen.items():
            room = self._room(shapes[device])
            if device in known and submodels.fits(known[device].held, room):
                found[device] = known[device]
            elif work == "train":
                share = self._config.head_room
                found[device] = submodels.begin(layers, shapes[device], room, share)
        return found

    def changed(
        self,
        rows: Mapping[str, LeaseRow],
        activations: Mapping[str, Floats],
        shapes: Mapping[str, Shape],
    ) -> tuple[dict[str, State], dict[str, Change]]:
        """Sub-models and their changes after the accepted updates of a training round.

        Parameters
        ----------
        activations : device -> [L, E], as far as the round brought them
        """
        c = self._config
        if c.structure == "none":
            return {}, {}
        scores = {}
        for device, row in rows.items():
            score = submodels.score(row.facts) if row.facts is not None else None
            if score is not None:
                scores[device] = score
        states, changes = submodels.after(
            scores,
            self.states(),
            {**self._store.activations(), **activations},
            {device: self._room(shape) for device, shape in shapes.items()},
            Rules(
                mode="freeze" if c.structure == "freeze" else "retry",
                patience=c.patience,
                trial=c.patience,
                similar=c.similar,
            ),
        )
        for device, change in changes.items():
            if change.kind != "none":
                log.info(
                    "device=%s structure: %s, %d experts, +%d -%d, score %.3f",
                    device,
                    change.kind,
                    states[device].experts,
                    len(change.added),
                    len(change.removed),
                    scores[device],
                )
        return states, changes


def stored(states: Mapping[str, State]) -> dict[str, str]:
    """What `store` keeps of them."""
    return {device: structure.to_json(state) for device, state in states.items()}
