"""HTTP: bytes without meaning, either way, by which `device_profiles.measure` finds the speed of a link."""

from __future__ import annotations

import os

from aiohttp import web

MOST = 64 << 20
PIECE = 256 << 10


async def send(request: web.Request) -> web.StreamResponse:
    """`GET /v1/link?bytes=N`: N random bytes, which nothing on the way can make smaller."""
    text = request.query.get("bytes", "")
    if not (text.isascii() and text.isdecimal() and len(text) < 10 and 0 < int(text) <= MOST):
        return web.json_response({"error": f"bytes: 1 to {MOST} wanted"}, status=400)
    left, piece = int(text), os.urandom(PIECE)
    response = web.StreamResponse(headers={"Content-Length": str(left)})
    response.content_type = "application/octet-stream"
    await response.prepare(request)
    while left:
        await response.write(piece[:left])
        left -= min(left, PIECE)
    return response


async def receive(request: web.Request) -> web.Response:
    """`POST /v1/link`: counts the body and forgets it."""
    count = 0
    async for piece in request.content.iter_any():
        count += len(piece)
        if count > MOST:
            return web.json_response({"error": f"more than {MOST} bytes"}, status=413)
    return web.json_response({"bytes": count})


ROUTES = [web.get("/v1/link", send), web.post("/v1/link", receive)]
