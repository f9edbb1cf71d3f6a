"""Uploads in progress: who may send how much, and the chunks that have arrived, on disk.

STATE/uploads/<xfer>.json  what was granted        STATE/uploads/<xfer>.part  the bytes, at their final offsets
STATE/uploads/<xfer>.have  one byte per chunk, set after its bytes were written; so a killed server resumes.

The broker acknowledges a chunk when it has it in memory, which proves nothing. Only receipts do, and only the sum of
granted bytes bounds the broker's memory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from protocol import chunks
from protocol.chunks import Chunk

log = logging.getLogger(__name__)

WINDOW = 8  # chunks in flight per device
MISSING_AT_ONCE = 1024
IDLE_SECONDS = 60.0  # a grant without progress for so long makes room for others
RECEIPT_CHUNKS = 16
RECEIPT_SECONDS = 2.0


class UploadError(ValueError):
    """A chunk that does not fit its grant."""


@dataclass(frozen=True, kw_only=True)
class Granted:
    """What was offered and granted."""

    lease: str
    device: str
    xfer: str
    bytes: int
    sha256: str
    chunk_bytes: int


@dataclass(kw_only=True)
class Upload:
    """A granted upload and its progress. Times are the caller's, in seconds."""

    granted: Granted
    have: bytearray = field(repr=False)
    active: float  # last sign of the device
    chunk_at: float = 0.0
    receipt_at: float = 0.0
    since_receipt: int = 0
    finishing: bool = False
    retried: bool = False

    @property
    def complete(self) -> bool:
        """All chunks are on disk."""
        return all(self.have)

    def missing(self, *, stalled: bool) -> tuple[int, ...]:
        """Chunks to ask for: all missing ones when `stalled`, else only gaps below the highest that arrived.

        >>> granted = Granted(lease="l", device="d", xfer="x", bytes=40, sha256="", chunk_bytes=10)
        >>> upload = Upload(granted=granted, have=bytearray([1, 0, 1, 0]), active=0)
        >>> upload.missing(stalled=False), upload.missing(stalled=True)
        ((1,), (1, 3))
        """
        end = len(self.have) if stalled else self.have.rfind(1) + 1
        gaps = (i for i in range(end) if not self.have[i])
        return tuple(i for i, _ in zip(gaps, range(MISSING_AT_ONCE), strict=False))


def xfer_id(lease: str, sha256: str) -> str:
    """Id of the upload of one content for one lease: the same after a restart of either side."""
    return hashlib.sha256(f"{lease}:{sha256}".encode()).hexdigest()[:20]


class Uploads:
    """Uploads under `folder`, at most `budget_bytes` of active grants at a time (one is always allowed)."""

    def __init__(self, folder: Path, budget_bytes: int, now: float) -> None:
        self._folder = folder
        self._budget = budget_bytes
        self._uploads: dict[str, Upload] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("*.json")):
            self._resume(path, now)

    def _resume(self, path: Path, now: float) -> None:
        try:
            granted = Granted(**json.loads(path.read_bytes()))
            have = bytearray(path.with_suffix(".have").read_bytes())
        except (OSError, ValueError, TypeError) as error:
            log.warning("upload %s dropped: %s", path.stem, error)
            self._unlink(path.stem)
            return
        if len(have) != chunks.count(granted.bytes, granted.chunk_bytes):
            self._unlink(path.stem)
            return
        self._uploads[granted.xfer] = _new(granted, have, now)

    def all(self) -> list[Upload]:
        """Uploads in progress."""
        return list(self._uploads.values())

    def grant(
        self, *, lease: str, device: str, size: int, sha256: str, chunk_bytes: int, now: float
    ) -> Upload | None:
        """Allow an upload, or find it when it was allowed before; None when there is no room now."""
        xfer = xfer_id(lease, sha256)
        known = self._uploads.get(xfer)
        if known is not None:
            known.active = now
            return known
        active = [u for u in self._uploads.values() if now - u.active < IDLE_SECONDS]
        if active and sum(u.granted.bytes for u in active) + size > self._budget:
            return None
        for other in self.all():  # a lease has one upload; another content replaces the former
            if other.granted.lease == lease:
                self.drop(other.granted.xfer)
        granted = Granted(
            lease=lease,
            device=device,
            xfer=xfer,
            bytes=size,
            sha256=sha256,
            chunk_bytes=chunk_bytes,
        )
        upload = _new(granted, bytearray(chunks.count(size, chunk_bytes)), now)
        self._path(xfer, "part").write_bytes(b"")
        self._path(xfer, "have").write_bytes(bytes(upload.have))
        partial = self._path(xfer, "tmp")
        partial.write_text(json.dumps(asdict(granted)))
        os.replace(partial, self._path(xfer, "json"))
        self._uploads[xfer] = upload
        return upload

    def add(self, device: str, xfer: str, chunk: Chunk, now: float) -> Upload | None:
        """Write a chunk to disk; None when nobody was granted this upload.

        Raises
        ------
        UploadError
            Wrong device, wrong count, wrong length.
        """
        upload = self._uploads.get(xfer)
        if upload is None:
            return None
        granted = upload.granted
        if granted.device != device:
            raise UploadError(f"upload {xfer} was granted to another device")
        if chunk.count != len(upload.have):
            raise UploadError(f"chunk of {chunk.count}, {len(upload.have)} granted")
        offset = chunk.index * granted.chunk_bytes
        wanted = min(granted.chunk_bytes, granted.bytes - offset)
        if len(chunk.body) != wanted:
            raise UploadError(f"chunk {chunk.index} of {len(chunk.body)} bytes, {wanted} wanted")
        upload.active = upload.chunk_at = now
        upload.since_receipt += 1
        if upload.have[chunk.index] or upload.finishing:
            return upload
        _write_at(self._path(xfer, "part"), chunk.body, offset)
        _write_at(self._path(xfer, "have"), b"\1", chunk.index)
        upload.have[chunk.index] = 1
        return upload

    def check(self, upload: Upload) -> bool:
        """Whether the bytes on disk are the offered ones. If not, everything is asked for again (see `Run`)."""
        digest = hashlib.sha256(self.path(upload).read_bytes()).hexdigest()
        return digest == upload.granted.sha256

    def restart(self, upload: Upload) -> None:
        """Forget all chunks."""
        upload.have[:] = bytes(len(upload.have))
        self._path(upload.granted.xfer, "have").write_bytes(bytes(upload.have))
        upload.retried, upload.finishing = True, False

    def path(self, upload: Upload) -> Path:
        """Where the bytes are."""
        return self._path(upload.granted.xfer, "part")

    def drop(self, xfer: str) -> None:
        """Remove an upload and its files."""
        self._uploads.pop(xfer, None)
        self._unlink(xfer)

    def _path(self, xfer: str, kind: str) -> Path:
        return self._folder / f"{xfer}.{kind}"

    def _unlink(self, xfer: str) -> None:
        for kind in ("json", "have", "part", "tmp"):
            self._path(xfer, kind).unlink(missing_ok=True)


def _new(granted: Granted, have: bytearray, now: float) -> Upload:
    return Upload(granted=granted, have=have, active=now, chunk_at=now, receipt_at=now)


def _write_at(path: Path, data: bytes, offset: int) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(descriptor, data, offset)
    finally:
        os.close(descriptor)
