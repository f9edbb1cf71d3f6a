"""`python -m server`: the main path. Flags -> artifacts and state -> broker, HTTP and MQTT around one `Run`."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import AsyncIterator, Sequence

from aiohttp import web

from protocol import messages, topics
from protocol.manifest import ManifestError
from server import config as configuration
from server import speed
from server.artifacts import Artifacts
from server.broker import HOST, KINDS, broker, free_port
from server.config import Config, ConfigError
from server.mqtt import BrokerError, Link, parse_url
from server.presets import PRESETS
from server.routes import BROKER_URL, ROUTES, RUN, blob_etag, json_errors
from server.run import Run
from server.store import StateError, Store

log = logging.getLogger(__name__)
FAREWELL_SECONDS = 5.0  # how long --exit-when-done waits for devices to leave


def make_app(run: Run, broker_url: str) -> web.Application:
    """The HTTP side of a run."""
    app = web.Application(client_max_size=messages.MAX_MESSAGE, middlewares=[json_errors])
    app[RUN] = run
    app[BROKER_URL] = broker_url
    app.add_routes([*ROUTES, *speed.ROUTES])
    app.on_response_prepare.append(blob_etag)
    return app


@contextlib.asynccontextmanager
async def _broker_of(config: Config, store: Store) -> AsyncIterator[str]:
    """URL of the broker to use; one of our own runs while the context is open."""
    if config.broker not in ("auto", *KINDS):
        parse_url(config.broker)
        yield config.broker
        return
    # The same port as before a restart, because devices keep trying it.
    port = free_port(store.number("broker_port"))
    store.put(broker_port=port)
    if config.host != HOST:
        log.warning("our broker listens on %s only; devices elsewhere need --broker mqtt://", HOST)
    async with broker(config.broker, config.state / "broker", port):
        yield f"mqtt://{HOST}:{port}"


@contextlib.asynccontextmanager
async def _linked(url: str, fleet: str, run_id: str) -> AsyncIterator[Link]:
    link = Link(parse_url(url), f"server-{run_id}", topics.server_filters(fleet))
    try:
        yield link
    finally:
        link.stop()


@contextlib.asynccontextmanager
async def _listening(app: web.Application, config: Config) -> AsyncIterator[int]:
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, config.host, config.port, shutdown_timeout=2.0)
        await site.start()
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


async def _farewell(run: Run) -> None:
    """Wait until the run is over and its devices have left, or had the time to."""
    await run.over.wait()
    for _ in range(int(FAREWELL_SECONDS / 0.1)):
        await asyncio.sleep(0.1)
        if not run.state.online:
            return


async def serve(config: Config) -> None:
    """Serve until SIGTERM, SIGINT, or the end of the run with --exit-when-done.

    Raises
    ------
    ConfigError, ManifestError, StateError, BrokerError, OSError
        When the server cannot start; nothing is listening then.
    """
    artifacts = Artifacts(config.store)
    if PRESETS[config.method].adapters and artifacts.base.projections != ("adapter",):
        raise ConfigError(
            f"--method {config.method} wants adapter experts, {config.store} has none"
        )
    artifacts.routers()  # a store without its dense blob shall fail now, not after the first round
    store = Store(config.state, artifacts.base.base)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    try:
        async with (
            _broker_of(config, store) as url,
            _linked(url, config.fleet, store.run) as link,
        ):
            run = Run(config, artifacts, store, link)
            for_devices = config.device_broker or parse_url(url).public()
            async with _listening(make_app(run, for_devices), config) as port:
                print(f"listening on http://{config.host}:{port} broker {for_devices}", flush=True)
                link.start()
                ends = [
                    asyncio.create_task(run.main(), name="run"),
                    asyncio.create_task(stop.wait(), name="stop"),
                ]
                if config.exit_when_done:
                    ends.append(asyncio.create_task(_farewell(run), name="farewell"))
                try:
                    done, _ = await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        task.result()
                finally:
                    for task in ends:
                        task.cancel()
                    await asyncio.gather(*ends, return_exceptions=True)
    finally:
        store.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the server; 0 after an orderly end, 2 with one line on stderr when it cannot start."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s"
    )
    try:
        asyncio.run(serve(configuration.parse(argv)))
    except (ConfigError, ManifestError, StateError, BrokerError, OSError) as error:
        print(f"server: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0
