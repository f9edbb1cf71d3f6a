"""A round is opened and closed: what the pure parts decide goes to files, then into the database.

Files first, the transaction that makes them count last: what a crash leaves behind counts for nothing.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from pathlib import Path

from protocol.manifest import ManifestError, Shape
from protocol.messages import Lease
from server import adapters, closing, leases, views
from server.artifacts import Artifacts
from server.config import Config
from server.delivery import Delivery
from server.rounds import CloseRound, OpenRound
from server.store import StateError, Store

log = logging.getLogger(__name__)
KEEP_ROUNDS = 2  # adapter slices of older rounds are removed


class Turns:
    """The rounds of one run. One call at a time.

    Raises
    ------
    StateError
        The adapter in the state has a lower rank than slots of the store.
    """

    def __init__(
        self, config: Config, artifacts: Artifacts, store: Store, delivery: Delivery, blobs: Path
    ) -> None:
        """`blobs` is where devices find the slices of the adapter."""
        self._config, self._artifacts, self._store = config, artifacts, store
        self._delivery, self._blobs = delivery, blobs
        self._adapters = config.state / "adapters"
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
            router_learning_rate=c.router_learning_rate,
            deadline=c.deadline,
            seed=c.seed,
            exploration=c.exploration,
            coverage=c.coverage,
            profile=c.profile,
            profile_rows=c.profile_rows,
            profile_clip=c.profile_clip,
            profile_noise=c.profile_noise,
        )
        shapes = self.shapes(list(command.devices))
        values, counts = self._store.values(), self._store.trained_counts()
        former = self._store.last_leases()
        chosen = await asyncio.to_thread(
            leases.select, command, shapes, values, counts, former, base, terms
        )
        made = await asyncio.to_thread(
            leases.write_leases,
            command,
            chosen,
            shapes,
            base=base,
            terms=terms,
            version=self._version,
            adapter_folder=self._adapters,
            blob_folder=self._blobs,
        )
        self._store.open_round(command.round, made.items())
        log.info("round=%d %s opened: %d devices", command.round, command.work, len(made))
        return made

    async def close(self, command: CloseRound) -> None:
        """Fold what was accepted into the next version and make it count."""
        rows, version = self._store.leases(command.round), self._version
        accepted = {d: r for d, r in rows.items() if r.state == "accepted"}
        folded = await asyncio.to_thread(
            closing.fold,
            {
                d: closing.Reported(
                    path=self._delivery.path(r.lease.lease), tokens=r.facts.tokens if r.facts else 0
                )
                for d, r in accepted.items()
            },
            base=self._artifacts.base,
            values=self._store.values(),
            trained_counts=self._store.trained_counts(),
            adapter=adapters.read_version(self._adapters, version),
            beta=self._config.beta,
            rule=self._config.aggregate,
            prior=self._config.prior,
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
        )
        self._store.close_round(
            command.round,
            version,
            json.dumps(line),
            folded.values,
            folded.trained_counts,
            over=command.work == "evaluate",
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
