"""HTTP: registration, downloads, status. Errors are JSON: {"error": "one line"}."""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable, Callable
from pathlib import Path

from aiohttp import web

from protocol import PROTOCOL_VERSION, messages, topics
from protocol.manifest import ManifestError
from protocol.messages import MessageError, Register, Welcome
from server.run import Run

RUN = web.AppKey("run", Run)
BROKER_URL = web.AppKey("broker_url", str)
_SHA256 = re.compile(r"[0-9a-f]{64}")
_IMMUTABLE = "public, max-age=31536000, immutable"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _error(status: int, text: str) -> web.Response:
    return web.json_response({"error": text}, status=status)


@web.middleware
async def json_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn aiohttp's own errors (404, 405, 413) into the same JSON form."""
    try:
        return await handler(request)
    except web.HTTPException as error:
        if error.status < 400:
            raise
        return _error(error.status, error.reason)


async def healthz(request: web.Request) -> web.Response:
    """Alive."""
    return web.json_response({"ok": True})


async def register(request: web.Request) -> web.Response:
    """Add a device, or welcome it back when it shows its token."""
    run = request.app[RUN]
    try:
        wanted = messages.expect(Register, await request.read())
        if not topics.ID.fullmatch(wanted.device):
            raise MessageError("device id of letters, digits, - and _ wanted, at most 64")
        if wanted.rows < 0:
            raise MessageError(f"{wanted.rows} rows")
    except MessageError as error:
        return _error(400, str(error))
    try:
        run.artifacts.manifest(wanted.profile)
    except ManifestError as error:
        return _error(404, str(error))
    known = run.store.device(wanted.device)
    if known is not None and not _same(wanted.token, known.token):
        return _error(409, f"device '{wanted.device}' is known and this is not its token")
    token = run.store.register(wanted.device, wanted.profile, wanted.rows)
    welcome = Welcome(
        protocol=PROTOCOL_VERSION,
        fleet=run.config.fleet,
        run=run.store.run,
        token=token,
        broker=request.app[BROKER_URL],
        base=run.artifacts.base.base,
        task=run.config.task,
    )
    return web.Response(body=messages.encode(welcome), content_type="application/json")


def _same(shown: str | None, token: str) -> bool:
    return shown is not None and secrets.compare_digest(shown.encode(), token.encode())


async def base(request: web.Request) -> web.StreamResponse:
    """The base index."""
    artifacts = request.app[RUN].artifacts
    path = artifacts.folder / "base.json"
    return web.FileResponse(path, headers=artifacts.signature(path))


async def artifact(request: web.Request) -> web.StreamResponse:
    """A profile's manifest."""
    artifacts = request.app[RUN].artifacts
    try:
        path = artifacts.manifest_path(request.match_info["profile"])
    except ManifestError as error:
        return _error(404, str(error))
    return web.FileResponse(path, headers=artifacts.signature(path))


async def blob(request: web.Request) -> web.StreamResponse:
    """A blob by its content hash; ranges and `If-None-Match` are supported."""
    run, sha256 = request.app[RUN], request.match_info["sha256"]
    if run.config.require_token:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not run.store.has_token(token):
            return _error(401, "the token of a registered device is wanted")
    if not _SHA256.fullmatch(sha256):
        return _error(400, "a sha256 in hexadecimal is wanted")
    etag = f'"{sha256}"'
    headers = {"ETag": etag, "Cache-Control": _IMMUTABLE}
    if etag in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    path = _find(run, sha256)
    if path is None:
        return _error(404, f"no blob {sha256}")
    response = web.FileResponse(path, headers=headers)
    response.content_type = "application/octet-stream"
    return response


async def blob_etag(request: web.Request, response: web.StreamResponse) -> None:
    """Put the content's hash back where aiohttp has put the file's time, just before the headers leave."""
    if request.match_info.handler is blob and response.status in (200, 206, 304):
        response.headers["ETag"] = f'"{request.match_info["sha256"]}"'


def _find(run: Run, sha256: str) -> Path | None:
    for path in (run.artifacts.blob_path(sha256), run.blobs / sha256):
        if path.is_file():
            return path
    return None


async def status(request: web.Request) -> web.Response:
    """The run, for people and the live view."""
    return web.json_response(request.app[RUN].status())


async def experts(request: web.Request) -> web.Response:
    """Which device holds which experts, and how old they are."""
    return web.json_response(request.app[RUN].experts())


async def history(request: web.Request) -> web.Response:
    """Closed rounds, one JSON line each."""
    text = "".join(f"{line}\n" for line in request.app[RUN].store.history())
    return web.Response(text=text, content_type="application/jsonl")


ROUTES = [
    web.get("/healthz", healthz),
    web.post("/v1/devices", register),
    web.get("/v1/base", base),
    web.get("/v1/artifacts/{profile}", artifact),
    web.get("/v1/blobs/{sha256}", blob),
    web.get("/v1/run", status),
    web.get("/v1/experts", experts),
    web.get("/v1/history", history),
]
