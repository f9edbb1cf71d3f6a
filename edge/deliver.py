"""One upload as a state machine: offer -> grant -> chunks -> receipts. Pure: time and messages come in, actions go out.

A PUBACK only frees a place in the window; it is never taken as delivery. Only a final receipt ends an upload.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from protocol import chunks, topics
from protocol.messages import Grant, Receipt

OFFER_EVERY = 3.0
QUIET = 6.0
"""Seconds without any sign of the server, with all chunks sent, before the update is offered again."""
STUCK = 60.0
"""The same while chunks are on their way: one may take long on a slow line."""


@dataclass(frozen=True)
class SendOffer:
    """Say the offer (again)."""


@dataclass(frozen=True)
class SendChunk:
    """Send chunk `index` under `xfer`."""

    xfer: str
    index: int
    chunk_bytes: int


Action = SendOffer | SendChunk


@dataclass
class Delivery:
    """State of the upload of one update of `size` bytes for `lease`."""

    lease: str
    size: int
    outcome: Receipt | None = None
    grant: Grant | None = None
    _queue: list[int] = field(default_factory=list)
    _flying: set[int] = field(default_factory=set)
    _offered: float = float("-inf")
    _heard: float = float("-inf")
    _asking: bool = True

    @property
    def over(self) -> bool:
        """A final receipt has come."""
        return self.outcome is not None

    def on_grant(self, grant: Grant, now: float) -> None:
        """Permission to send. One that is new, or that answers a repeated offer, starts from the first chunk."""
        usable = topics.ID.fullmatch(grant.xfer) and grant.window >= 1 and grant.chunk_bytes >= 1
        if grant.lease != self.lease or self.over or not usable:
            return
        fresh = self.grant is None or grant.xfer != self.grant.xfer
        if not fresh and not self._asking:
            return  # a duplicate in the middle of the upload
        self.grant, self._asking, self._heard = grant, False, now
        self._queue = list(range(chunks.count(self.size, grant.chunk_bytes)))
        if fresh:
            self._flying.clear()

    def on_receipt(self, receipt: Receipt, now: float) -> None:
        """What is missing, or the end."""
        if receipt.lease != self.lease or self.over:
            return
        if receipt.final:
            self.outcome = receipt
            return
        if self.grant is None or receipt.xfer != self.grant.xfer:
            return
        self._heard, self._asking = now, False
        total = chunks.count(self.size, self.grant.chunk_bytes)
        known = self._flying.union(self._queue)
        self._queue += [i for i in receipt.missing if 0 <= i < total and i not in known]

    def on_sent(self, xfer: str, index: int, now: float) -> None:
        """A chunk has left: its place in the window is free."""
        if self.grant is not None and xfer == self.grant.xfer:
            self._flying.discard(index)
            self._heard = now

    def on_reconnected(self) -> None:
        """What was in flight may be lost, and the server may be a new process: ask again."""
        self._flying.clear()
        self._asking, self._offered = True, float("-inf")

    def actions(self, now: float) -> list[Action]:
        """What to do now; call it after every event and a few times a second."""
        if self.over:
            return []
        if self.grant is not None and not self._asking:
            waiting = bool(self._queue or self._flying)
            if now - self._heard > (STUCK if waiting else QUIET):
                self._asking = True
                self._flying.clear()
        out: list[Action] = []
        if self._asking and now - self._offered >= OFFER_EVERY:
            self._offered = now
            out.append(SendOffer())
        while self.grant is not None and self._queue and len(self._flying) < self.grant.window:
            index = self._queue.pop(0)
            if index in self._flying:
                continue
            self._flying.add(index)
            out.append(SendChunk(self.grant.xfer, index, self.grant.chunk_bytes))
        return out
