"""One run: messages and ticks go into `rounds.step`, its commands are carried out here.

Three tasks: `listen` (messages from the broker), `tick` (time, overdue receipts), `work` (everything slow, one at a
time, off the event loop: `turns` of rounds, checking updates). State changes happen on the event loop only.
"""

from __future__ import annotations

import asyncio
import collections
import logging
import time
from dataclasses import replace
from typing import Any

from protocol import messages, topics
from protocol.chunks import ChunkError
from protocol.messages import (
    Message,
    MessageError,
    Offer,
    Ready,
    Receipt,
    RoundInfo,
    RunOver,
    Status,
)
from server import rounds, views
from server.artifacts import Artifacts
from server.config import Config
from server.delivery import Delivery
from server.mqtt import Incoming, Link
from server.rounds import CloseRound, OpenRound, SendLease, SendOver
from server.store import Device, Store
from server.turns import Turns
from server.uploads import Upload, UploadError

log = logging.getLogger(__name__)
TICK_SECONDS = 0.25
SEEN_SECONDS = 5.0  # how precisely last_seen is kept
Job = OpenRound | CloseRound | Upload


class Run:
    """Everything between the sockets and the pure core.

    Raises
    ------
    StateError
        The adapter in the state has a lower rank than slots of the store.
    """

    def __init__(self, config: Config, artifacts: Artifacts, store: Store, link: Link) -> None:
        self.config, self.artifacts, self.store = config, artifacts, store
        self.blobs = config.state / "blobs"
        self._link = link
        self._jobs: asyncio.Queue[Job] = asyncio.Queue()
        self._malformed: collections.deque[dict[str, str]] = collections.deque(maxlen=50)
        self._seen: dict[str, float] = {}
        self.over = asyncio.Event()
        self._delivery = Delivery(
            state=config.state,
            budget_bytes=config.upload_budget,
            chunk_bytes=config.chunk_bytes,
            store=store,
            artifacts=artifacts,
            say=self._say,
            whole=self._jobs.put_nowait,
            settled=self._settled,
        )
        self._turns = Turns(config, artifacts, store, self._delivery, self.blobs)
        self.state = self._restore()
        link.on_connected = self._announce

    @property
    def version(self) -> int:
        """Current version of the adapter."""
        return self.store.number("version")

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
            first=0 if c.initial == "profile" else 1,
            reprofile=c.reprofile if c.initial == "profile" else 0,
        )
        round = max(plan.first, self.store.number("round"))
        state = rounds.State(plan=plan, round=round, since=now)
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
            await self._turns.write_first_version()
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

    # Events in

    async def _listen(self) -> None:
        while True:
            incoming = await self._link.receive()
            try:
                self._take(incoming)
            finally:
                incoming.done()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            self._step(rounds.Tick(now=now))
            self._delivery.tick(now)

    def _take(self, incoming: Incoming) -> None:
        topic = topics.parse_up(incoming.topic)
        if topic is None or topic.fleet != self.config.fleet or not incoming.payload:
            return
        now = time.monotonic()
        try:
            device = self._sender(topic.device, now)
            if topic.kind == "chunk":
                self._delivery.chunk(topic, incoming.payload, now)
            else:
                self._take_message(device, topic.kind, messages.decode(incoming.payload), now)
        except (MessageError, ChunkError, UploadError) as error:
            self._malformed.append({"device": topic.device, "reason": str(error)})
            log.warning("device=%s refused: %s", topic.device, error)

    def _sender(self, name: str, now: float) -> Device:
        device = self.store.device(name)
        if device is None:
            raise MessageError("not registered")
        if now - self._seen.get(name, -SEEN_SECONDS) >= SEEN_SECONDS:
            self.store.seen(name, time.time())
            self._seen[name] = now
        return device

    def _take_message(self, device: Device, kind: str, message: Message, now: float) -> None:
        name = device.device
        if getattr(message, "device", name) != name:
            raise MessageError(f"{message.kind} that names another device")
        match message:
            case Status() if kind == "status":
                self._step(rounds.Online(device=name, online=message.state == "online", now=now))
            case Ready() if kind == "ctl":
                if message.run != self.store.run:
                    raise MessageError(f"ready for run '{message.run[:64]}'")
                self._step(rounds.Ready(device=name, now=now))
            case Offer() if kind == "ctl":
                is_open = self.state.phase == "open"
                self._delivery.offer(device, message, self.state.round if is_open else None, now)
            case _:
                raise MessageError(f"{message.kind} on the wrong topic")

    def _settled(self, device: str, accepted: bool) -> None:
        now = time.monotonic()
        self._step(rounds.Delivered(device=device, accepted=accepted, now=now))

    # Commands out

    def _step(self, event: rounds.Event) -> None:
        self.state, commands = rounds.step(self.state, event)
        for command in commands:
            match command:
                case OpenRound() | CloseRound():
                    self._jobs.put_nowait(command)
                case SendLease(device=device):
                    self._send_lease(device)
                case SendOver(device=None):
                    log.info("run=%s is over, adapter version %d", self.store.run, self.version)
                    for name in self.store.devices():
                        self._say(name, RunOver(run=self.store.run))
                    self.over.set()
                case SendOver(device=str(device)):
                    self._say(device, RunOver(run=self.store.run))

    def _say(self, device: str, message: Message) -> None:
        fleet = self.config.fleet
        if isinstance(message, Receipt):
            topic = topics.down_receipt(fleet, device)
        else:
            topic = topics.down_ctl(fleet, device)
        self._link.publish(topic, messages.encode(message))

    def _send_lease(self, device: str) -> None:
        row = self.store.leases(self.state.round).get(device)
        if row is not None and row.state == "open":
            left = max(0.0, self.state.deadline - time.monotonic())
            self._say(device, replace(row.lease, seconds=left))

    def _announce(self) -> None:
        info = RoundInfo(
            run=self.store.run,
            round=self.state.round,
            base_version=self.version,
            over=self.state.phase == "over",
        )
        topic = topics.round_info(self.config.fleet)
        self._link.publish(topic, messages.encode(info), retain=True)

    async def _work(self) -> None:
        while True:
            job = await self._jobs.get()
            match job:
                case OpenRound():
                    made = await self._turns.open(job)
                    self._step(rounds.Opened(devices=frozenset(made), now=time.monotonic()))
                    self._announce()
                case CloseRound():
                    await self._turns.close(job)
                    self._step(rounds.Closed(now=time.monotonic()))
                    self._announce()
                case Upload():
                    await self._delivery.finish(job)

    def status(self) -> dict[str, Any]:
        """GET /v1/run."""
        devices = self.store.devices()
        return views.run_status(
            run=self.store.run,
            version=self.version,
            state=self.state,
            devices=devices,
            shapes=self._turns.shapes(list(devices)),
            leases=self.store.leases(self.state.round),
            accepted=self.store.accepted(),
            uploading=self._delivery.devices(),
            rejected=[*self.store.rejections(), *self._malformed],
        )

    def experts(self) -> dict[str, Any]:
        """GET /v1/experts."""
        return views.expert_map(
            run=self.store.run,
            version=self.version,
            versions=self.store.expert_versions(),
            leases=self.store.last_leases(),
            structures=self._turns.stage_two.states(),
            base=self.artifacts.base,
        )
