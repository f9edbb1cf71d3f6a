"""One run: messages and ticks go into `rounds.step`, its commands are carried out here.

Three tasks: `listen` (messages from the broker), `tick` (time, overdue receipts), `work` (everything slow, one at a
time, off the event loop: leases, checking updates, aggregation). State changes happen on the event loop only.
"""

from __future__ import annotations

import asyncio
import collections
import json
import logging
import os
import secrets
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from protocol import chunks, messages, topics
from protocol.chunks import ChunkError
from protocol.manifest import ManifestError
from protocol.messages import (
    Grant,
    Lease,
    Message,
    MessageError,
    Offer,
    Ready,
    Receipt,
    RoundInfo,
    RunOver,
    Status,
)
from server import accept, adapters, choose_experts, peft_adapter, rounds, uploads, views
from server.accept import UpdateRejected
from server.aggregate import Aggregated, Contribution, aggregate
from server.artifacts import Artifacts
from server.config import Config
from server.mqtt import Incoming, Link
from server.rounds import CloseRound, OpenRound, SendLease, SendOver
from server.store import LeaseRow, Store
from server.uploads import Upload, UploadError, Uploads

log = logging.getLogger(__name__)
TICK_SECONDS = 0.25
SEEN_SECONDS = 5.0  # how precisely last_seen is kept
KEEP_ROUNDS = 2  # adapter slices of older rounds are removed


class Run:
    """Everything between the sockets and the pure core."""

    def __init__(self, config: Config, artifacts: Artifacts, store: Store, link: Link) -> None:
        self.config, self.artifacts, self.store = config, artifacts, store
        self._link = link
        self._adapters = config.state / "adapters"
        self._updates = config.state / "updates"
        self.blobs = config.state / "blobs"
        self._updates.mkdir(parents=True, exist_ok=True)
        self._uploads = Uploads(config.state / "uploads", config.upload_budget, time.monotonic())
        self._jobs: asyncio.Queue[OpenRound | CloseRound | Upload] = asyncio.Queue()
        self._malformed: collections.deque[dict[str, str]] = collections.deque(maxlen=50)
        self._seen: dict[str, float] = {}
        self.over = asyncio.Event()
        self.state = self._restore()
        link.on_connected = self._announce

    def _restore(self) -> rounds.State:
        """The state machine as the database has it; an open round gets a fresh deadline of full length."""
        c, now = self.config, time.monotonic()
        plan = rounds.Plan(
            rounds=c.rounds,
            min_updates=c.min_updates,
            min_devices=c.min_devices,
            deadline=c.deadline,
            per_round=c.per_round,
            seed=c.seed,
        )
        state = rounds.State(plan=plan, round=self.store.number("round"), since=now)
        phase = self.store.get("phase")
        if phase == "over":
            self.over.set()
            return replace(state, phase="over")
        if phase != "open":
            return state
        rows = self.store.leases(state.round)
        log.info("round=%d goes on with %d leases", state.round, len(rows))
        return replace(
            state,
            phase="open",
            leased=frozenset(rows),
            accepted=frozenset(d for d, r in rows.items() if r.state == "accepted"),
            rejected=frozenset(d for d, r in rows.items() if r.state == "rejected"),
            deadline=now + plan.deadline,
        )

    async def main(self) -> None:
        """Run until cancelled; ends early only when one of the tasks fails."""
        if self.store.get("version") is None:
            await asyncio.to_thread(self._write_version, 0, None)
            self.store.put(version=0)
        tasks = [
            asyncio.create_task(self._listen(), name="listen"),
            asyncio.create_task(self._tick(), name="tick"),
            asyncio.create_task(self._work(), name="work"),
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Events in, commands out

    def _step(self, event: rounds.Event) -> None:
        self.state, commands = rounds.step(self.state, event)
        for command in commands:
            match command:
                case OpenRound() | CloseRound():
                    self._jobs.put_nowait(command)
                case SendLease(device=device):
                    self._send_lease(device)
                case SendOver(device=device):
                    self._send_over(device)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._step(rounds.Tick(now=now))
            for upload in self._uploads.all():
                if not upload.finishing and now - upload.receipt_at >= uploads.RECEIPT_SECONDS:
                    stalled = now - upload.active >= uploads.RECEIPT_SECONDS
                    self._receipt(upload, stalled=stalled)

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            match job:
                case OpenRound():
                    await self._open_round(job)
                case CloseRound():
                    await self._close_round(job)
                case Upload():
                    await self._finish(job)

    async def _listen(self) -> None:
        while True:
            incoming = await self._link.receive()
            try:
                self._take(incoming)
            finally:
                incoming.done()

    def _take(self, incoming: Incoming) -> None:
        topic = topics.parse_up(incoming.topic)
        if topic is None or topic.fleet != self.config.fleet or not incoming.payload:
            return
        device, now = topic.device, time.monotonic()
        try:
            if self._known(device, now) is False:
                raise MessageError("not registered")
            if topic.kind == "chunk":
                self._take_chunk(topic, incoming.payload, now)
                return
            message = messages.decode(incoming.payload)
            sender = getattr(message, "device", device)
            if sender != device:
                raise MessageError(f"{message.kind} that names another device")
            match message:
                case Status() if topic.kind == "status":
                    online = message.state == "online"
                    self._step(rounds.Online(device=device, online=online, now=now))
                case Ready() if topic.kind == "ctl":
                    if message.run != self.store.run:
                        raise MessageError(f"ready for run '{message.run[:64]}'")
                    self._step(rounds.Ready(device=device, now=now))
                case Offer() if topic.kind == "ctl":
                    self._take_offer(message, now)
                case _:
                    raise MessageError(f"{message.kind} on the wrong topic")
        except (MessageError, ChunkError, UploadError) as error:
            self._malformed.append({"device": device, "reason": str(error)})
            log.warning("device=%s refused: %s", device, error)

    def _known(self, device: str, now: float) -> bool:
        if now - self._seen.get(device, -SEEN_SECONDS) >= SEEN_SECONDS:
            if self.store.device(device) is None:
                return False
            self.store.seen(device, time.time())
            self._seen[device] = now
        return True

    def _send(self, topic: str, message: Message, *, retain: bool = False) -> None:
        self._link.publish(topic, messages.encode(message), retain=retain)

    def _control(self, device: str, message: Lease | Grant | RunOver) -> None:
        self._send(topics.down_ctl(self.config.fleet, device), message)

    def _announce(self) -> None:
        info = RoundInfo(
            run=self.store.run,
            round=self.state.round,
            base_version=self.store.number("version"),
            over=self.state.phase == "over",
        )
        self._send(topics.round_info(self.config.fleet), info, retain=True)

    def _send_lease(self, device: str) -> None:
        row = self.store.leases(self.state.round).get(device)
        if row is not None and row.state == "open":
            left = max(0.0, self.state.deadline - time.monotonic())
            self._control(device, replace(row.lease, seconds=left))

    def _send_over(self, device: str | None) -> None:
        for name in [device] if device is not None else self.store.devices():
            self._control(name, RunOver(run=self.store.run))
        if device is None:
            self._announce()
            self.over.set()
            log.info("run=%s is over, adapter version %d", self.store.run, self.version)

    @property
    def version(self) -> int:
        """Current version of the adapter."""
        return self.store.number("version")

    # Uploads

    def _take_offer(self, offer: Offer, now: float) -> None:
        row = self.store.lease(offer.lease)
        if row is None or row.device != offer.device:
            self._final(offer.device, offer.lease, "", reason="unknown lease")
            raise MessageError(f"offer for unknown lease '{offer.lease[:80]}'")
        if row.state == "accepted":
            self._final(offer.device, offer.lease, "", accepted=True)
            return
        if row.state != "open" or row.lease.round != self.state.round or self._closing:
            self._final(offer.device, offer.lease, "", reason=row.reason or "stale")
            return
        device = self.store.device(offer.device)
        assert device is not None
        if not messages.verify(
            offer.mac, device.token, offer.lease, row.lease.nonce, offer.sha256, offer.bytes
        ):
            self._final(offer.device, offer.lease, "", reason="wrong signature")
            raise MessageError("offer with a wrong signature")
        most = accept.max_update_bytes(row.lease.trained, self.artifacts.base, self.artifacts.rank)
        if not 0 < offer.bytes <= most:
            self._refuse(row, "", f"update of {offer.bytes} bytes, at most {most} wanted")
            return
        upload = self._uploads.grant(
            lease=offer.lease,
            device=offer.device,
            size=offer.bytes,
            sha256=offer.sha256,
            chunk_bytes=chunks.CHUNK_BYTES,
            now=now,
        )
        if upload is None:
            return  # no room now; the device offers again
        grant = Grant(
            lease=offer.lease,
            xfer=upload.granted.xfer,
            chunk_bytes=upload.granted.chunk_bytes,
            window=uploads.WINDOW,
        )
        self._control(offer.device, grant)
        upload.receipt_at = now
        self._check_complete(upload)

    @property
    def _closing(self) -> bool:
        return self.state.phase != "open"

    def _take_chunk(self, topic: topics.UpTopic, payload: bytes, now: float) -> None:
        chunk = chunks.parse(payload)
        if chunk.index != topic.index:
            raise ChunkError(f"chunk {chunk.index} on the topic of chunk {topic.index}")
        upload = self._uploads.add(topic.device, topic.xfer, chunk, now)
        if upload is None:
            return  # of a lease that is settled; its receipt was sent
        self._check_complete(upload)
        if not upload.finishing and upload.since_receipt >= uploads.RECEIPT_CHUNKS:
            self._receipt(upload, stalled=False)

    def _check_complete(self, upload: Upload) -> None:
        if upload.complete and not upload.finishing:
            upload.finishing = True
            self._jobs.put_nowait(upload)

    def _receipt(self, upload: Upload, *, stalled: bool) -> None:
        upload.receipt_at, upload.since_receipt = time.monotonic(), 0
        granted = upload.granted
        receipt = Receipt(
            lease=granted.lease,
            xfer=granted.xfer,
            missing=upload.missing(stalled=stalled),
            final=False,
            accepted=False,
            reason="",
        )
        self._send(topics.down_receipt(self.config.fleet, granted.device), receipt)
        if upload.complete:  # after a restart: all there, not checked yet
            self._check_complete(upload)

    def _final(
        self, device: str, lease: str, xfer: str, *, accepted: bool = False, reason: str = ""
    ) -> None:
        receipt = Receipt(
            lease=lease, xfer=xfer, missing=(), final=True, accepted=accepted, reason=reason
        )
        self._send(topics.down_receipt(self.config.fleet, device), receipt)

    def _refuse(self, row: LeaseRow, xfer: str, reason: str) -> None:
        """Settle an open lease for good without counting it."""
        log.warning("round=%d device=%s refused: %s", row.lease.round, row.device, reason)
        self.store.reject(row.lease.round, row.device, reason, row.lease.lease)
        self._final(row.device, row.lease.lease, xfer, reason=reason)
        now = time.monotonic()
        self._step(rounds.Delivered(device=row.device, accepted=False, now=now))

    async def _finish(self, upload: Upload) -> None:
        """All chunks are here: check the update, make it durable, say so."""
        granted = upload.granted
        row = self.store.lease(granted.lease)
        if row is None or row.state != "open":
            self._uploads.drop(granted.xfer)
            self._final(
                granted.device,
                granted.lease,
                granted.xfer,
                accepted=row is not None and row.state == "accepted",
                reason="" if row is None else row.reason,
            )
            return
        try:
            if not await asyncio.to_thread(self._uploads.check, upload):
                if not upload.retried:
                    log.warning("device=%s upload differs from its hash, again", row.device)
                    self._uploads.restart(upload)
                    self._receipt(upload, stalled=True)
                    return
                raise UpdateRejected("content differs from the offered hash")
            good = await asyncio.to_thread(self._check, upload, row)
            if self._closing or row.lease.round != self.state.round:
                raise UpdateRejected("stale")
        except UpdateRejected as error:
            self._uploads.drop(granted.xfer)
            self._refuse(row, granted.xfer, str(error))
            return
        await asyncio.to_thread(self._keep, upload)
        weight = float(good.trained_tokens.sum())
        self.store.accept(granted.lease, granted.bytes, weight, good.facts)
        self._uploads.drop(granted.xfer)
        self._final(row.device, granted.lease, granted.xfer, accepted=True)
        log.info(
            "round=%d device=%s update of %.2f MB accepted",
            row.lease.round,
            row.device,
            granted.bytes / 1e6,
        )
        now = time.monotonic()
        self._step(rounds.Delivered(device=row.device, accepted=True, now=now))

    def _check(self, upload: Upload, row: LeaseRow) -> accept.Accepted:
        base, lease = self.artifacts.base, row.lease
        profile = self._profile(row.device)
        try:
            shape = self.artifacts.manifest(profile).shape
        except ManifestError as error:
            raise UpdateRejected(str(error)) from error
        data = self._uploads.path(upload).read_bytes()
        most = accept.max_update_bytes(lease.trained, base, shape.rank)
        return accept.accept(data, lease, base, shape, most, lease.base_version)

    def _profile(self, device: str) -> str:
        known = self.store.device(device)
        assert known is not None
        return known.profile

    def _keep(self, upload: Upload) -> None:
        """Move the bytes to STATE/updates so that they survive whatever comes."""
        with open(self._uploads.path(upload), "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._uploads.path(upload), self._update_path(upload.granted.lease))

    def _update_path(self, lease: str) -> Path:
        return self._updates / f"{lease}.safetensors"

    # Rounds

    async def _open_round(self, command: OpenRound) -> None:
        leases = await asyncio.to_thread(self._make_leases, command)
        self.store.open_round(command.round, leases.items())
        held = sum(len(e) for lease in leases.values() for e in lease.resident.values())
        log.info(
            "round=%d %s: %d devices hold %d experts",
            command.round,
            command.work,
            len(leases),
            held,
        )
        now = time.monotonic()
        self._step(rounds.Opened(devices=frozenset(leases), now=now))
        self._announce()

    def _make_leases(self, command: OpenRound) -> dict[str, Lease]:
        c, base = self.config, self.artifacts.base
        slots = {}
        for device in command.devices:
            try:
                slots[device] = self.artifacts.manifest(self._profile(device)).shape.slots
            except ManifestError as error:
                log.warning("device=%s gets no lease: %s", device, error)
        resident = self._choose(command, slots)
        adapter = adapters.read_version(self._adapters, self.version)
        leases = {}
        for device, experts in resident.items():
            held = {str(layer): tuple(experts[i]) for i, layer in enumerate(base.moe_layers)}
            seed = np.random.SeedSequence([c.seed, command.round, *device.encode()])
            leases[device] = Lease(
                lease=f"{self.store.run}-{command.round}-{device}-1",
                run=self.store.run,
                round=command.round,
                attempt=1,
                work=command.work,
                base_version=self.version,
                resident=held,
                trained=held if command.work == "train" else {},
                adapter=adapters.write_blob(self.blobs, adapters.slice_for(adapter, held)),
                steps=c.steps if command.work == "train" else 0,
                learning_rate=c.learning_rate,
                router_learning_rate=c.router_learning_rate,
                seed=int(seed.generate_state(1)[0]),
                seconds=c.deadline,
                nonce=secrets.token_hex(8),
            )
        return leases

    def _choose(
        self, command: OpenRound, slots: dict[str, tuple[int, ...]]
    ) -> dict[str, list[list[int]]]:
        base, c = self.artifacts.base, self.config
        prior = np.asarray(base.routing_prior, np.float64)
        known = self.store.values()
        value = {device: known.get(device, prior) for device in slots}
        counts = self.store.trained_counts()
        if counts is not None and command.work == "train":
            bonus = choose_experts.exploration_bonus(counts, command.round, c.exploration)
            value = {device: v + bonus for device, v in value.items()}
        # The last round only measures: every device shows what it would hold for itself.
        coverage = 0.0 if command.work == "evaluate" else c.coverage
        return choose_experts.choose(value, slots, top_k=base.top_k, coverage=coverage, seed=c.seed)

    async def _close_round(self, command: CloseRound) -> None:
        rows = self.store.leases(command.round)
        done = {d: r for d, r in rows.items() if r.state == "accepted"}
        version = self.version
        aggregated, values, trained = await asyncio.to_thread(self._aggregate, command, done)
        if aggregated is not None:
            version += 1
            await asyncio.to_thread(self._write_version, version, aggregated)
        opened = float(self.store.get("opened") or time.time())
        line = views.history_line(
            round=command.round,
            work=command.work,
            version=version,
            seconds=time.time() - opened,
            closed_by=command.by,
            leases=rows,
            devices=self.store.devices(),
            rejected=self.store.rejections(command.round),
            aggregated=aggregated,
            base=self.artifacts.base,
        )
        over = command.round > self.config.rounds
        text = json.dumps(line)
        self.store.close_round(command.round, version, text, values, trained, over)
        await asyncio.to_thread(self._tidy, command.round, list(rows.values()))
        log.info(
            "round=%d %s closed by %s: %d of %d devices, version %d, %.1f s",
            command.round,
            command.work,
            command.by,
            len(done),
            len(rows),
            version,
            line["seconds"],
        )
        self._step(rounds.Closed(now=time.monotonic()))
        self._announce()

    def _aggregate(
        self, command: CloseRound, done: dict[str, LeaseRow]
    ) -> tuple[Aggregated | None, dict[str, choose_experts.Floats], Any]:
        """New adapter (None when nothing was trained), smoothed expert values, counts of trainings."""
        base = self.artifacts.base
        former = self.store.values()
        counts = self.store.trained_counts()
        if counts is None:
            counts = np.zeros((len(base.moe_layers), base.num_experts), np.int64)
        values, contributions = {}, []
        for device, row in done.items():
            tensors = adapters.map_tensors(self._update_path(row.lease.lease))
            tensors.pop("facts")
            stats = {k[6:]: tensors.pop(k) for k in list(tensors) if k.startswith("stats.")}
            if row.facts is not None and row.facts.tokens > 0:
                new = choose_experts.values(stats, row.facts.tokens, self.config.beta)
                values[device] = choose_experts.smooth(former.get(device), new)
            tokens = stats["trained_tokens"]
            counts = counts + (tokens > 0)
            weights = {
                (base.moe_layers[i], int(e)): float(tokens[i, e])
                for i, e in zip(*np.nonzero(tokens), strict=True)
            }
            contributions.append(Contribution(device=device, tensors=tensors, weights=weights))
        if command.work != "train" or not any(c.weights for c in contributions):
            return None, values, counts
        adapter = adapters.read_version(self._adapters, self.version)
        rule, prior = self.config.aggregate, self.config.prior
        return aggregate(adapter, contributions, rule=rule, prior=prior), values, counts

    def _write_version(self, version: int, aggregated: Aggregated | None) -> None:
        base = self.artifacts.base
        if aggregated is None:
            adapter = adapters.fresh(base, self.artifacts.rank)
        else:
            adapter = aggregated.adapter
        files = peft_adapter.peft_files(
            adapter,
            self.artifacts.routers(),
            base,
            version=version,
            base_name=self.config.base_name or f"{base.model_type}-{base.base[:12]}",
        )
        adapters.write_version(self._adapters, version, adapter, files)

    def _tidy(self, round: int, rows: list[LeaseRow]) -> None:
        """Write history.jsonl anew and remove what no later round can need."""
        text = "".join(f"{line}\n" for line in self.store.history())
        adapters.write_atomically(self.config.state / "history.jsonl", text.encode())
        for row in rows:
            self._update_path(row.lease.lease).unlink(missing_ok=True)
        leases = {row.lease.lease for row in rows}
        for upload in self._uploads.all():
            if upload.granted.lease in leases:
                self._uploads.drop(upload.granted.xfer)
        kept = {
            row.lease.adapter.sha256
            for r in range(max(0, round - KEEP_ROUNDS + 1), round + 1)
            for row in self.store.leases(r).values()
        }
        for path in self.blobs.glob("*"):
            if path.name not in kept:
                path.unlink(missing_ok=True)

    # For people

    def status(self) -> dict[str, Any]:
        """GET /v1/run."""
        devices = self.store.devices()
        slots = {}
        for name, device in devices.items():
            try:
                slots[name] = self.artifacts.manifest(device.profile).shape.slots
            except ManifestError:
                continue
        return views.run_status(
            run=self.store.run,
            version=self.version,
            state=self.state,
            devices=devices,
            slots=slots,
            leases=self.store.leases(self.state.round),
            accepted=self.store.accepted(),
            uploading=frozenset(u.granted.device for u in self._uploads.all()),
            rejected=[*self.store.rejections(), *self._malformed],
        )
