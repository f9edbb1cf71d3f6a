"""Files named by their content. Writing the same bytes twice costs nothing; nothing is ever half-written."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from protocol.manifest import Blob


def write_atomically(path: Path, data: bytes) -> None:
    """Write beside the target, then rename over it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".part-")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


class BlobStore:
    """`STORE/blobs`."""

    def __init__(self, store: Path) -> None:
        self.folder = store / "blobs"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.new_bytes = 0

    def put(self, data: bytes) -> Blob:
        """Keep `data`; returns its name and size."""
        blob = Blob(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        path = self.folder / blob.sha256
        if not (path.is_file() and path.stat().st_size == len(data)):
            write_atomically(path, data)
            self.new_bytes += len(data)
        return blob

    def get(self, blob: Blob) -> bytes:
        """The bytes of a blob."""
        return (self.folder / blob.sha256).read_bytes()
