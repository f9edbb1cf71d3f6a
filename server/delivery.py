"""Updates on their way in: offer -> grant -> chunks -> receipts, and the check at the end.

Nothing is said to be accepted before it is durable, and every question about a settled lease gets the same answer
again, whoever asks and however late.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from protocol import chunks, messages, topics, update
from protocol.chunks import ChunkError
from protocol.manifest import ManifestError
from protocol.messages import Grant, Lease, MessageError, Offer, Receipt
from server import accept, adapters, uploads
from server.accept import UpdateRejected
from server.artifacts import Artifacts
from server.store import Device, LeaseRow, Store
from server.uploads import Upload, Uploads

log = logging.getLogger(__name__)
STALE = "stale"
Say = Callable[[str, Grant | Receipt], None]  # to a device


class Delivery:
    """Uploads of one run. Everything but `finish` runs on the event loop and does not wait."""

    def __init__(
        self,
        *,
        state: Path,
        budget_bytes: int,
        chunk_bytes: int,
        store: Store,
        artifacts: Artifacts,
        say: Say,
        whole: Callable[[Upload], None],
        settled: Callable[[str, bool], None],
    ) -> None:
        """`whole` takes an upload that waits for `finish`; `settled` hears (device, accepted)."""
        self._store, self._artifacts = store, artifacts
        self._say, self._whole, self._settled = say, whole, settled
        self._chunk_bytes = chunk_bytes
        self._adapters = state / "adapters"
        self._updates = state / "updates"
        self._updates.mkdir(parents=True, exist_ok=True)
        self._uploads = Uploads(state / "uploads", budget_bytes, time.monotonic())

    def path(self, lease: str) -> Path:
        """Where the accepted update of a lease is."""
        return self._updates / f"{lease}.safetensors"

    def devices(self) -> frozenset[str]:
        """Devices that are uploading."""
        return frozenset(u.granted.device for u in self._uploads.all())

    def offer(self, device: Device, offer: Offer, round: int | None, now: float) -> None:
        """Answer an offer with a grant, a final receipt, or (no room now) not at all.

        Parameters
        ----------
        round : the open round, None between rounds

        Raises
        ------
        MessageError
            Unknown lease or wrong signature; the device has its answer.
        """
        row = self._store.lease(offer.lease)
        if row is None or row.device != device.device:
            self._final(device.device, offer.lease, reason="unknown lease")
            raise MessageError(f"offer for unknown lease '{offer.lease[:80]}'")
        if row.state != "open" or row.lease.round != round:
            self._answer(row)
            return
        nonce, size = row.lease.nonce, offer.bytes
        if not messages.verify(offer.mac, device.token, offer.lease, nonce, offer.sha256, size):
            self._final(device.device, offer.lease, reason="wrong signature")
            raise MessageError("offer with a wrong signature")
        try:
            most = accept.max_update_bytes(row.lease, self._slots(row)[1], self._artifacts.base)
        except (UpdateRejected, ManifestError) as error:
            self._refuse(row, str(error))
            return
        if not 0 < size <= most:
            self._refuse(row, f"update of {size} bytes, at most {most} wanted")
            return
        upload = self._uploads.grant(
            lease=offer.lease,
            device=device.device,
            size=size,
            sha256=offer.sha256,
            chunk_bytes=self._chunk_bytes,
            now=now,
        )
        if upload is None:
            return  # the device offers again
        grant = Grant(
            lease=offer.lease,
            xfer=upload.granted.xfer,
            chunk_bytes=upload.granted.chunk_bytes,
            window=uploads.WINDOW,
        )
        self._say(device.device, grant)
        self._look(upload)

    def chunk(self, topic: topics.UpTopic, payload: bytes, now: float) -> None:
        """Take a chunk; it is on disk when this returns.

        Raises
        ------
        ChunkError, UploadError
            Not a chunk, or not one of this upload.
        """
        chunk = chunks.parse(payload)
        if chunk.index != topic.index:
            raise ChunkError(f"chunk {chunk.index} on the topic of chunk {topic.index}")
        upload = self._uploads.add(topic.device, topic.xfer, chunk, now)
        if upload is None:
            return  # of a lease that is settled; its receipt was sent
        self._look(upload)
        if not upload.finishing and upload.since_receipt >= uploads.RECEIPT_CHUNKS:
            self._receipt(upload, now, stalled=False)

    def tick(self, now: float) -> None:
        """Send the receipts that are due."""
        for upload in self._uploads.all():
            self._look(upload)  # all there since before a restart
            if now - upload.receipt_at >= uploads.RECEIPT_SECONDS:
                stalled = now - upload.chunk_at >= uploads.RECEIPT_SECONDS
                self._receipt(upload, now, stalled=stalled)

    def end_round(self, leases: list[LeaseRow]) -> None:
        """Forget the files of a closed round, and tell whoever is still sending."""
        ended = {row.lease.lease for row in leases}
        for lease in ended:
            self.path(lease).unlink(missing_ok=True)
        for upload in self._uploads.all():
            if upload.granted.lease in ended and not upload.finishing:
                self._final(upload.granted.device, upload.granted.lease, reason=STALE)
                self._uploads.drop(upload.granted.xfer)

    async def finish(self, upload: Upload) -> None:
        """All chunks are here: check the update, make it durable, say so. One at a time."""
        granted = upload.granted
        row = self._store.lease(granted.lease)
        if row is None or row.state != "open":
            self._uploads.drop(granted.xfer)
            if row is not None:
                self._answer(row)
            return
        try:
            if not await asyncio.to_thread(self._uploads.check, upload):
                if not upload.retried:
                    log.warning("device=%s upload differs from its hash, once more", row.device)
                    self._uploads.restart(upload)
                    self._receipt(upload, time.monotonic(), stalled=True)
                    return
                raise UpdateRejected("content differs from the offered hash")
            tokens, rank_of = self._slots(row)
            path, version = self._uploads.path(upload), self._store.number("version")
            good = await asyncio.to_thread(self._check, path, row, rank_of, tokens, version)
        except (UpdateRejected, ManifestError) as error:
            self._uploads.drop(granted.xfer)
            self._refuse(row, str(error))
            return
        await asyncio.to_thread(self._settle, path, row, good)
        weight = float(good.trained_tokens.sum())
        self._store.accept(granted.lease, granted.bytes, weight, good.facts)
        self._uploads.drop(granted.xfer)
        self._final(row.device, granted.lease, accepted=True)
        size = granted.bytes / 1e6
        log.info("round=%d device=%s accepted %.2f MB", row.lease.round, row.device, size)
        self._settled(row.device, True)

    def _check(
        self, path: Path, row: LeaseRow, rank_of: accept.RankOf, tokens_per_step: int, version: int
    ) -> accept.Accepted:
        lease, leased = row.lease, None
        if _coded(lease) and lease.base_version == version:
            adapter = adapters.read_version(self._adapters, version)
            leased = adapters.part_for(adapter, rank_of, self._artifacts.base)
        return accept.accept(
            path.read_bytes(),
            lease,
            self._artifacts.base,
            rank_of=rank_of,
            tokens_per_step=tokens_per_step,
            version=version,
            leased=leased,
        )

    def _settle(self, path: Path, row: LeaseRow, good: accept.Accepted) -> None:
        """Make an accepted update durable, as values: the end of the round reads no codes."""
        target = self.path(row.lease.lease)
        if _coded(row.lease):
            adapters.write_atomically(target, update.pack(good.tensors, good.stats, good.facts))
        else:
            _move(path, target)

    def _slots(self, row: LeaseRow) -> tuple[int, accept.RankOf]:
        """Tokens per step of the device's program, ranks of the slots that its experts are in.

        Raises
        ------
        ManifestError
            Its artifact is gone, or was built anew with fewer slots since the lease was made.
        """
        device = self._store.device(row.device)
        assert device is not None
        shape = self._artifacts.manifest(device.profile).shape
        try:
            rank_of = adapters.ranks(row.lease.resident, shape, self._artifacts.base)
        except ValueError as error:
            raise ManifestError(f"{device.profile} was built anew: {error}") from error
        return shape.batch * shape.sequence, rank_of

    def _look(self, upload: Upload) -> None:
        if upload.complete and not upload.finishing:
            upload.finishing = True
            self._whole(upload)

    def _answer(self, row: LeaseRow) -> None:
        """Repeat what became of a lease; one that is open although its round is not is stale."""
        accepted = row.state == "accepted"
        reason = "" if accepted else row.reason or STALE
        self._final(row.device, row.lease.lease, accepted=accepted, reason=reason)

    def _refuse(self, row: LeaseRow, reason: str) -> None:
        """Settle an open lease without counting it."""
        log.warning("round=%d device=%s refused: %s", row.lease.round, row.device, reason)
        self._store.reject(row.lease.round, row.device, reason, row.lease.lease)
        self._final(row.device, row.lease.lease, reason=reason)
        self._settled(row.device, False)

    def _receipt(self, upload: Upload, now: float, *, stalled: bool) -> None:
        upload.receipt_at, upload.since_receipt = now, 0
        granted = upload.granted
        receipt = Receipt(
            lease=granted.lease,
            xfer=granted.xfer,
            missing=upload.missing(stalled=stalled),
            final=False,
            accepted=False,
            reason="",
        )
        self._say(granted.device, receipt)

    def _final(self, device: str, lease: str, *, accepted: bool = False, reason: str = "") -> None:
        receipt = Receipt(
            lease=lease, xfer="", missing=(), final=True, accepted=accepted, reason=reason
        )
        self._say(device, receipt)


def _coded(lease: Lease) -> bool:
    return lease.uplink != "float32" or lease.downlink != "float32"


def _move(source: Path, target: Path) -> None:
    with open(source, "rb") as file:
        os.fsync(file.fileno())
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
