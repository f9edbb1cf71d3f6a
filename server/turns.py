"""A round is opened and closed: what the pure parts decide goes to files, then into the database.

Files first, the transaction that makes them count last: what a crash leaves behind counts for nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path

import numpy as np

from protocol.manifest import ManifestError, Shape
from protocol.messages import Lease
from server import adapters, closing, leases, prediction, scaffold, stage_two, submodels, views
from server.artifacts import Artifacts
from server.config import Config
from server.delivery import Delivery
from server.rounds import CloseRound, OpenRound
from server.stage_two import StageTwo
from server.store import StateError, Store

log = logging.getLogger(__name__)
KEEP_ROUNDS = 2  # adapter slices of older rounds are removed


class Turns:
    """The rounds of one run. One call at a time.

    Raises
    ------
    StateError
        The adapter in the state has a lower rank than slots of the store, or a sub-model cannot be read.
    """

    def __init__(
        self, config: Config, artifacts: Artifacts, store: Store, delivery: Delivery, blobs: Path
    ) -> None:
        """`blobs` is where devices find the slices of the adapter."""
        self._config, self._artifacts, self._store = config, artifacts, store
        self._delivery, self._blobs = delivery, blobs
        self._adapters = config.state / "adapters"
        self.stage_two = StageTwo(config, artifacts.base, store)
        self._check_rank()

    def _check_rank(self) -> None:
        if self._store.get("version") is None:
            return
        found, wanted = adapters.rank(self._adapters, self._version), self._artifacts.rank
        if found < wanted:
            raise StateError(
                f"{self._config.state}: adapter of rank {found}, the store has slots of rank {wanted}"
            )

    @property
    def _version(self) -> int:
        return self._store.number("version")

    async def write_first_version(self) -> None:
        """Version 0: an adapter that changes nothing."""
        artifacts = self._artifacts
        adapter = adapters.fresh(artifacts.base, artifacts.rank)
        await asyncio.to_thread(
            closing.write_version, self._adapters, 0, adapter, artifacts, self._config.base_name
        )
        self._store.put(version=0)

    def shapes(self, devices: list[str]) -> dict[str, Shape]:
        """Device -> the shape of its program; without those whose artifact is gone."""
        known, shapes = self._store.devices(), {}
        for name in devices:
            try:
                shapes[name] = self._artifacts.manifest(known[name].profile).shape
            except ManifestError as error:
                log.warning("device=%s has no artifact: %s", name, error)
        return shapes

    async def open(self, command: OpenRound) -> dict[str, Lease]:
        """Choose everyone's experts and make the leases count; device -> lease."""
        c, base = self._config, self._artifacts.base
        terms = leases.Terms(
            run=self._store.run,
            steps=c.steps,
            learning_rate=c.learning_rate,
            router_learning_rate=(
                c.gate_rate_factor * c.learning_rate
                if c.gate_rate_factor
                else c.router_learning_rate
            ),
            deadline=c.deadline,
            seed=c.seed,
            exploration=c.exploration,
            coverage=c.coverage,
            gate_warmup=c.gate_warmup,
            objective=c.rules.objective(c.objective, command.round),
            active_below=c.active_below,
            cap_share=c.cap_share,
            uplink=c.uplink,
            downlink=c.downlink,
            strategy=c.strategy,
            uplink_bytes=c.uplink_bytes,
            profile=c.profile,
            profile_rows=c.profile_rows,
            profile_clip=c.profile_clip,
            profile_noise=c.profile_noise,
        )
        known = self._store.devices()
        fleet = self.shapes(list(known))
        values, counts = self._store.values(), self._store.trained_counts()
        last = self._store.last_leases()
        if command.work == "evaluate":
            last = {device: lease for device, lease in last.items() if lease.work == "train"}
        former = leases.holdings(last, base)
        mass = self._store.trained_mass()
        values = prediction.complete(
            values,
            list(fleet),
            {name: device.rows for name, device in known.items()},
            np.asarray(base.routing_prior, np.float64),
            initial=c.initial,
            seed=c.seed,
        )
        everyone = await asyncio.to_thread(
            leases.select, command, fleet, values, counts, mass, former, base, terms
        )
        # All of the fleet count as holders; the devices of the round get leases.
        shapes = {d: shape for d, shape in fleet.items() if d in command.devices}
        chosen = {device: everyone[device] for device in shapes}
        states = self.stage_two.begun(command.work, chosen, shapes)
        chosen = submodels.pin(chosen, shapes, states, former)
        made = await asyncio.to_thread(
            leases.write_leases,
            command,
            chosen,
            shapes,
            values,
            base=base,
            terms=terms,
            version=self._version,
            adapter_folder=self._adapters,
            blob_folder=self._blobs,
            held={device: state.held for device, state in states.items()},
            trained_counts=counts,
        )
        self._store.open_round(command.round, made.items(), stage_two.stored(states))
        log.info("round=%d %s opened: %d devices", command.round, command.work, len(made))
        return made

    async def close(self, command: CloseRound) -> None:
        """Fold what was accepted into the next version and make it count."""
        rows, version = self._store.leases(command.round), self._version
        accepted = {d: r for d, r in rows.items() if r.state == "accepted"}
        before = self._store.trained_counts()
        folded = await asyncio.to_thread(
            closing.fold,
            {
                d: closing.Reported(
                    path=self._delivery.path(r.lease.lease),
                    tokens=r.facts.tokens if r.facts else 0,
                    rows=r.facts.rows if r.facts else 0,
                )
                for d, r in accepted.items()
            },
            base=self._artifacts.base,
            # Profiling begins anew: former values describe an adapter of long ago.
            values=self._store.values() if command.work != "profile" else {},
            trained_counts=before,
            adapter=adapters.read_version(self._adapters, version),
            beta=self._config.beta,
            trained_mass=self._store.trained_mass(),
            relevance=self._config.relevance,
            lam=self._config.lam,
            decay=self._config.decay,
            rules=self._config.rules,
            routers=self._artifacts.routers(),
            control=scaffold.read(self._adapters, version),
        )
        if folded.aggregated is not None:
            version += 1
            await asyncio.to_thread(
                closing.write_version,
                self._adapters,
                version,
                folded.aggregated.adapter,
                self._artifacts,
                self._config.base_name,
                folded.control,
            )
        states, changes = self.stage_two.changed(
            accepted if command.work == "train" else {},
            folded.activations,
            self.shapes(list(accepted)),
        )
        line = views.history_line(
            round=command.round,
            work=command.work,
            version=version,
            seconds=time.time() - float(self._store.get("opened") or time.time()),
            closed_by=command.by,
            leases=rows,
            devices=self._store.devices(),
            rejected=self._store.rejections(command.round),
            aggregated=folded.aggregated,
            base=self._artifacts.base,
            changes=changes,
        )
        self._store.close_round(
            command.round,
            version,
            json.dumps(line),
            folded.values,
            folded.trained_counts,
            folded.trained_mass,
            over=command.work == "evaluate",
            activations=folded.activations,
            expert_versions=closing.expert_versions(
                self._store.expert_versions(), before, folded.trained_counts, version
            ),
            structures=stage_two.stored(states),
        )
        self._tidy(command.round)
        log.info(
            "round=%d %s closed by %s: %d of %d devices, version %d, %.1f s",
            command.round,
            command.work,
            command.by,
            len(accepted),
            len(rows),
            version,
            line["seconds"],
        )

    def _tidy(self, round: int) -> None:
        """Write history.jsonl anew; remove what no later round can need."""
        text = "".join(f"{line}\n" for line in self._store.history())
        adapters.write_atomically(self._config.state / "history.jsonl", text.encode())
        self._delivery.end_round(list(self._store.leases(round).values()))
        kept = {
            blob.sha256
            for recent in range(max(0, round - KEEP_ROUNDS + 1), round + 1)
            for row in self._store.leases(recent).values()
            for blob in (row.lease.adapter, row.lease.profile_adapter)
            if blob is not None
        }
        for path in self._blobs.glob("*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)
