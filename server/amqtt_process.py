"""The embedded fallback broker, in its own process: `python -m server.amqtt_process HOST PORT`."""

from __future__ import annotations

import asyncio
import logging
import sys

from amqtt.broker import Broker


async def _serve(host: str, port: int) -> None:
    broker = Broker(
        {
            "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}},
            "plugins": {
                "amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True},
            },
        }
    )
    await broker.start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    logging.basicConfig(level=logging.ERROR)
    asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
