"""Files named by their content. Writing the same bytes twice costs nothing; nothing is ever half-written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import tempfile
import threading
from collections.abc import Collection, Iterator
from pathlib import Path

from protocol.manifest import Blob

PIECE = 1 << 20


class OtherBlob(ValueError):
    """A blob that a store of fixed content does not hold."""


class Part:
    """A file under way: it gets its name when it is whole. A killed process leaves nothing where the system allows."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._name = ""
        try:
            # Linux: a file without a name, gone with the process.
            self.descriptor = os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o644)
        except (AttributeError, OSError):
            self.descriptor, self._name = tempfile.mkstemp(dir=folder, prefix=".part-")
            os.chmod(self._name, 0o644)

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """All of `data`, at `offset`."""
        view = memoryview(data).cast("B")
        while view:
            written = os.pwrite(self.descriptor, view, offset)
            view, offset = view[written:], offset + written

    def blob(self) -> Blob:
        """Name and size of what has been written."""
        digest, size = hashlib.sha256(), 0
        while piece := os.pread(self.descriptor, PIECE, size):
            digest.update(piece)
            size += len(piece)
        return Blob(sha256=digest.hexdigest(), bytes=size)

    def keep(self, path: Path) -> None:
        """Give the file its name; one of that name is replaced."""
        if self._name:
            os.replace(self._name, path)
            self._name = ""
            return
        try:
            self._link(path)
        except FileExistsError:
            beside = path.with_name(f".part-{secrets.token_hex(8)}")
            self._link(beside)
            os.replace(beside, path)

    def _link(self, path: Path) -> None:
        # A directory descriptor makes Python call linkat(AT_SYMLINK_FOLLOW), which /proc needs.
        source = f"/proc/self/fd/{self.descriptor}"
        os.link(source, path, src_dir_fd=self.descriptor, follow_symlinks=True)

    def close(self) -> None:
        """Forget the file if it was not kept."""
        os.close(self.descriptor)
        if self._name:
            Path(self._name).unlink(missing_ok=True)


@contextlib.contextmanager
def part(folder: Path) -> Iterator[Part]:
    """A `Part` in `folder` that is closed whatever happens."""
    opened = Part(folder)
    try:
        yield opened
    finally:
        opened.close()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file or none."""
    with part(path.parent) as file:
        file.write(data, 0)
        file.keep(path)


class BlobStore:
    """`STORE/blobs`. Its methods may be called from several threads.

    Parameters
    ----------
    only : collection of sha256, or None
        The blobs that may be written; any other raises `OtherBlob` and leaves no trace.
    """

    def __init__(self, store: Path, only: Collection[str] | None = None) -> None:
        self.root, self.folder, self.only = store, store / "blobs", only
        self.folder.mkdir(parents=True, exist_ok=True)
        self.new_bytes = 0
        self._lock = threading.Lock()

    def put(self, data: bytes) -> Blob:
        """Keep `data`; returns its name and size."""
        blob = Blob(sha256=hashlib.sha256(data).hexdigest(), bytes=len(data))
        if not self._wanted(blob):
            return blob
        with part(self.folder) as file:
            file.write(data, 0)
            self._keep(file, blob)
        return blob

    def put_part(self, file: Part) -> Blob:
        """Keep a file that was written in pieces, in `folder`; returns its name and size."""
        blob = file.blob()
        if self._wanted(blob):
            self._keep(file, blob)
        return blob

    def _wanted(self, blob: Blob) -> bool:
        if self.only is not None and blob.sha256 not in self.only:
            raise OtherBlob(f"{self.root}: blob {blob.sha256[:12]} does not belong there")
        return blob not in self

    def _keep(self, file: Part, blob: Blob) -> None:
        file.keep(self.folder / blob.sha256)
        with self._lock:
            self.new_bytes += blob.bytes

    def __contains__(self, blob: Blob) -> bool:
        path = self.folder / blob.sha256
        return path.is_file() and path.stat().st_size == blob.bytes

    def get(self, blob: Blob) -> bytes:
        """The bytes of a blob."""
        return (self.folder / blob.sha256).read_bytes()
