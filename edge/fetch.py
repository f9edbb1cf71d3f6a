"""Everything that comes over HTTP: registration, indices, blobs. A cached blob is whole and checked, or not there.

Transient failures (server restarting, connection cut) are ridden out; what the server says no to is not repeated.
"""

from __future__ import annotations

import base64
import http.client
import json
import logging
import os
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edge.trust import Signed, Trust, TrustError
from protocol import PROTOCOL_VERSION, messages
from protocol.manifest import (
    BaseIndex,
    Blob,
    Manifest,
    ManifestError,
    parse_base,
    parse_manifest,
    sha256_file,
)

log = logging.getLogger(__name__)
PATIENCE = 180.0
"""Seconds without any progress after which a server counts as gone: long enough for a restart or an update."""
TIMEOUT = 20.0
MAX_JSON = 16 << 20
PIECE = 256 << 10


class FetchError(RuntimeError):
    """Something the server does not give, or gives wrong."""


class Transient(RuntimeError):
    """Worth another try."""


class Server:
    """The HTTP side of a server.

    Parameters
    ----------
    url : str
        `http://host:port`
    patience : float
        Seconds of failures in a row before `FetchError`.
    """

    def __init__(self, url: str, patience: float = PATIENCE) -> None:
        if not url.startswith(("http://", "https://")):
            raise FetchError(f"--server {url}: http://HOST:PORT wanted")
        self.url, self.patience, self.token = url.rstrip("/"), patience, ""

    def open(
        self, path: str, headers: dict[str, str], body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """One request.

        Raises
        ------
        Transient
            Not reachable, cut off, or a 5xx answer.
        FetchError
            Any other refusal; the message is the server's own.
        """
        if self.token:
            headers = {**headers, "Authorization": f"Bearer {self.token}"}
        try:
            request = urllib.request.Request(self.url + path, data=body, headers=headers)
            response: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=TIMEOUT)
            return response
        except urllib.error.HTTPError as error:
            with error:
                reason = _reason(error)
            if error.code >= 500 or error.code in (408, 429):
                raise Transient(f"{error.code} {reason}") from error
            raise FetchError(f"{self.url}{path}: {error.code} {reason}") from error
        except (OSError, http.client.HTTPException) as error:
            raise Transient(str(getattr(error, "reason", error)) or type(error).__name__) from error
        except ValueError as error:
            raise FetchError(f"--server {self.url}: {error}") from error

    def retry(self, what: str, attempt: Callable[[], Any]) -> Any:
        """Call `attempt` until it gives something, with growing pauses; `attempt` may report progress by returning
        None, which starts the patience anew.
        """
        started, pause = time.monotonic(), 0.25
        while True:
            try:
                result = attempt()
                if result is not None:
                    return result
                started, pause = time.monotonic(), 0.25
            except Transient as error:
                if time.monotonic() - started > self.patience:
                    raise FetchError(
                        f"{self.url}: no {what} for {self.patience:.0f} s: {error}"
                    ) from error
                log.warning("%s: %s, trying again in %.1f s", what, error, pause)
                time.sleep(pause * random.uniform(0.5, 1.5))
                pause = min(pause * 2, 10.0)

    def signed(self, path: str, body: bytes | None = None) -> Signed:
        """What a GET, or a POST of `body`, gives, with the signature that came along; raises FetchError."""

        def attempt() -> Signed:
            headers = {"Content-Type": "application/json"} if body is not None else {}
            try:
                with self.open(path, headers, body) as response:
                    data = response.read(MAX_JSON + 1)
                    signature = _decoded(response.headers.get("X-Signature"))
                    key = _decoded(response.headers.get("X-Signature-Key"))
            except (OSError, http.client.HTTPException) as error:
                raise Transient(str(error) or type(error).__name__) from error
            if len(data) > MAX_JSON:
                raise FetchError(f"{self.url}{path}: more than {MAX_JSON} bytes")
            return Signed(data, signature, key)

        answer: Signed = self.retry(path, attempt)
        return answer

    def json(self, path: str, body: bytes | None = None) -> Any:
        """Parsed JSON of a GET, or of a POST of `body`; raises FetchError."""
        return self._parsed(path, self.signed(path, body).data)

    def _parsed(self, path: str, data: bytes) -> Any:
        try:
            return json.loads(data)
        except (ValueError, RecursionError) as error:
            raise FetchError(f"{self.url}{path}: not JSON: {error}") from error

    def _trusted(self, path: str, trust: Trust | None) -> Any:
        """Parsed JSON of a GET that `trust` has nothing against."""
        answer = self.signed(path)
        if trust is None:
            return self._parsed(path, answer.data)
        try:
            return self._parsed(path, trust.check(self.url + path, answer))
        except TrustError:
            # Between two files of a store that is being rebuilt: once more.
            time.sleep(1.0)
            return self._parsed(path, trust.check(self.url + path, self.signed(path)))

    def register(self, device: str, profile: str, token: str | None, rows: int) -> messages.Welcome:
        """POST /v1/devices; raises FetchError."""
        body = messages.encode(
            messages.Register(
                protocol=PROTOCOL_VERSION,
                device=device,
                profile=profile,
                token=token,
                rows=rows,
            )
        )
        answer = self.json("/v1/devices", body)
        try:
            welcome = messages.expect(messages.Welcome, json.dumps(answer).encode())
        except messages.MessageError as error:
            raise FetchError(f"{self.url}/v1/devices: {error}") from error
        self.token = welcome.token
        return welcome

    def base(self, trust: Trust | None = None) -> BaseIndex:
        """GET /v1/base; raises FetchError, and TrustError when `trust` refuses it."""
        try:
            return parse_base(self._trusted("/v1/base", trust), f"{self.url}/v1/base")
        except ManifestError as error:
            raise FetchError(str(error)) from error

    def manifest(self, profile: str, trust: Trust | None = None) -> Manifest:
        """GET /v1/artifacts/{profile}; raises FetchError, and TrustError when `trust` refuses it."""
        path = f"/v1/artifacts/{profile}"
        try:
            found = parse_manifest(self._trusted(path, trust), self.url + path)
        except ManifestError as error:
            raise FetchError(str(error)) from error
        if found.profile != profile:
            raise FetchError(f"{self.url}{path}: manifest of {found.profile[:64]!r} found")
        if trust is not None:
            trust.check_version(self.url, found.base, profile, found.version)
        return found


def _decoded(header: str | None) -> bytes | None:
    try:
        return None if header is None else base64.b64decode(header, validate=True)
    except ValueError:
        return b""


def _reason(error: urllib.error.HTTPError) -> str:
    try:
        value = json.loads(error.read(4096))
        return str(value["error"])[:300]
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        return str(error.reason)


class BlobCache:
    """Blobs on flash, named by their content.

    Parameters
    ----------
    keep : int
        Bytes up to which blobs that were only borrowed stay in the folder, counting all that is there.
    """

    def __init__(self, server: Server, folder: Path, keep: int = 0) -> None:
        self.server, self.folder, self.keep, self.bytes_down = server, folder, keep, 0
        self._checked: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    @contextmanager
    def borrow(self, blob: Blob) -> Iterator[Path]:
        """Path of a blob that is removed afterwards, if it was not there before and there is no room to keep it.

        Raises as `get`. So a device can look at every expert of a base with flash for one more.
        """
        there = (self.folder / blob.sha256).exists()
        path = self.get(blob)
        try:
            yield path
        finally:
            if not there and self._held() > self.keep:
                self._checked.discard(blob.sha256)
                path.unlink(missing_ok=True)

    def _held(self) -> int:
        if not self.keep:
            return 1  # nothing is kept: no need to look
        return sum(path.stat().st_size for path in self.folder.iterdir())

    def get(self, blob: Blob) -> Path:
        """Path of a blob, fetched when it is not there. Content is checked once per process.

        Raises
        ------
        FetchError
            When the server twice sends bytes of another hash or size.
        """
        path = self.folder / blob.sha256
        if blob.sha256 in self._checked and path.exists():
            return path
        if path.exists():
            if path.stat().st_size == blob.bytes and sha256_file(path) == blob.sha256:
                self._checked.add(blob.sha256)
                return path
            log.error("blob %s in the cache is corrupted: fetching it again", blob.sha256[:12])
            path.unlink()
        part = self.folder / f"{blob.sha256}.part"
        for last in (False, True):
            self._download(blob, part)
            found = sha256_file(part)
            if found == blob.sha256:
                _settle(part, path)
                self._checked.add(blob.sha256)
                return path
            part.unlink()
            if not last:
                log.error(
                    "blob %s came with the hash %s: refused, fetching it again",
                    blob.sha256[:12],
                    found[:12],
                )
        raise FetchError(
            f"{self.server.url}/v1/blobs/{blob.sha256}: content has the hash {found[:12]}, refused twice"
        )

    def _download(self, blob: Blob, part: Path) -> None:
        if part.exists() and part.stat().st_size > blob.bytes:
            part.unlink()

        def attempt() -> bool | None:
            have = part.stat().st_size if part.exists() else 0
            if have == blob.bytes and part.exists():
                return True
            got = self._append(blob, part, have)
            if part.stat().st_size == blob.bytes:
                return True
            if got:
                return None  # cut off, but it went on: patience starts anew
            raise Transient("connection closed early")

        self.server.retry(f"blob {blob.sha256[:12]}", attempt)

    def _append(self, blob: Blob, part: Path, have: int) -> int:
        """Read from byte `have` on to the end of what comes; bytes read."""
        headers = {"Range": f"bytes={have}-", "If-Range": f'"{blob.sha256}"'} if have else {}
        got = 0
        with self.server.open(f"/v1/blobs/{blob.sha256}", headers) as response:
            # A server, or a proxy, without ranges sends the whole: start over.
            mode = "ab" if have and response.status == 206 else "wb"
            room = blob.bytes - (have if mode == "ab" else 0)
            with open(part, mode) as file:
                try:
                    while piece := response.read(min(PIECE, room + 1)):
                        if len(piece) > room:
                            raise FetchError(
                                f"{self.server.url}/v1/blobs/{blob.sha256}: more than the {blob.bytes} "
                                "bytes announced"
                            )
                        file.write(piece)
                        got, room = got + len(piece), room - len(piece)
                        self.bytes_down += len(piece)
                except (OSError, http.client.HTTPException) as error:
                    if isinstance(error, OSError) and error.errno in (28, 122):  # disk, quota full
                        raise FetchError(f"{part}: {error}") from error
                    log.warning("blob %s: cut off: %s", blob.sha256[:12], error)
        return got


def _settle(part: Path, path: Path) -> None:
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
