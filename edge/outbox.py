"""Updates on disk until the server has said that they are durable on its side, or that it will never want them.

An update is two files: `<lease>.safetensors`, then `<lease>.json`. The second is the commit: whatever a kill leaves
behind is either a whole update or is swept away at the next start.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from protocol import schema, topics

log = logging.getLogger(__name__)


class OutboxError(OSError):
    """The folder cannot be written."""


@dataclass(frozen=True, kw_only=True)
class Parcel:
    """What has to be known to offer an update again after a restart."""

    lease: str
    run: str
    nonce: str
    sha256: str
    bytes: int


class Outbox:
    """A folder of parcels."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._sweep()
        except OSError as error:
            raise OutboxError(f"{folder}: {error}") from error

    def put(self, lease: str, run: str, nonce: str, data: bytes) -> Parcel:
        """Make an update durable; raises OutboxError, and then nothing is left of it."""
        if not topics.ID.fullmatch(lease):
            raise OutboxError(f"lease {lease[:80]!r} is no name for a file")
        parcel = Parcel(
            lease=lease,
            run=run,
            nonce=nonce,
            sha256=hashlib.sha256(data).hexdigest(),
            bytes=len(data),
        )
        try:
            _write(self.folder / f"{lease}.safetensors", data)
            _write(self.folder / f"{lease}.json", json.dumps(schema.to_dict(parcel)).encode())
        except OSError as error:
            self.remove(lease)
            raise OutboxError(f"{self.folder}: {error}") from error
        return parcel

    def read(self, parcel: Parcel) -> bytes:
        """The update's bytes."""
        return (self.folder / f"{parcel.lease}.safetensors").read_bytes()

    def remove(self, lease: str) -> None:
        """Forget an update. The commit goes first, so that half a removal is an update that is not there."""
        (self.folder / f"{lease}.json").unlink(missing_ok=True)
        (self.folder / f"{lease}.safetensors").unlink(missing_ok=True)

    def waiting(self) -> list[Parcel]:
        """All whole parcels, oldest first."""
        found = []
        for path in sorted(
            self.folder.glob("*.json"), key=lambda p: (p.stat().st_mtime_ns, p.name)
        ):
            parcel = self._parcel(path)
            if parcel is not None:
                found.append(parcel)
        return found

    def _parcel(self, path: Path) -> Parcel | None:
        try:
            parcel = schema.from_dict(Parcel, json.loads(path.read_bytes()), path.name)
            data = path.with_suffix(".safetensors").read_bytes()
        except (OSError, ValueError):
            return None
        whole = (
            parcel.lease == path.stem
            and len(data) == parcel.bytes
            and hashlib.sha256(data).hexdigest() == parcel.sha256
        )
        return parcel if whole else None

    def _sweep(self) -> None:
        for path in self.folder.glob("*.tmp"):
            path.unlink()
        for path in self.folder.glob("*.json"):
            if self._parcel(path) is None:
                log.warning("outbox: %s is not whole, dropped", path.stem)
                self.remove(path.stem)
        for path in self.folder.glob("*.safetensors"):
            if not path.with_suffix(".json").exists():
                path.unlink()


def _write(path: Path, data: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
