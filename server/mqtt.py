"""The server's MQTT connection: paho in its own thread, a bounded hand-off to asyncio.

A message is acknowledged to the broker only after the server has dealt with it (chunks: written to disk), and at most
`IN_HAND` messages are between the two threads: beyond that the network thread stops reading and TCP pushes back.
MQTT 3.1.1, because that is what every broker speaks.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

log = logging.getLogger(__name__)
IN_HAND = 128
KEEPALIVE = 15


class BrokerError(ValueError):
    """A broker that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class BrokerUrl:
    """A parsed mqtt://[user:password@]host[:port] or mqtts://..."""

    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None

    def public(self) -> str:
        """The URL without user and password."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"mqtt{'s' if self.tls else ''}://{host}:{self.port}"


def parse_url(url: str) -> BrokerUrl:
    """Read a broker URL; raises BrokerError.

    >>> parse_url("mqtts://server:secret@broker.example").public()
    'mqtts://broker.example:8883'
    """
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise BrokerError(f"broker '{url}': {error}") from error
    if parts.scheme not in ("mqtt", "mqtts") or not parts.hostname:
        raise BrokerError(f"broker '{url}' found, mqtt://host:port or mqtts://host:port wanted")
    tls = parts.scheme == "mqtts"
    return BrokerUrl(
        host=parts.hostname,
        port=port or (8883 if tls else 1883),
        tls=tls,
        user=parts.username,
        password=parts.password,
    )


@dataclass(frozen=True, kw_only=True)
class Incoming:
    """A message that waits for its `done()`."""

    topic: str
    payload: bytes
    retained: bool
    done: Callable[[], None]


class Link:
    """Connects and reconnects on its own. Use `start`, `receive`, `publish`, `stop` from the event loop's thread."""

    def __init__(self, url: BrokerUrl, client_id: str, filters: Sequence[str]) -> None:
        self._url = url
        self._filters = list(filters)
        self._loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Incoming] = asyncio.Queue()
        self._room = threading.BoundedSemaphore(IN_HAND)
        self._stopping = threading.Event()
        self._generation = (
            0  # acknowledgements of a former connection must not be sent on a new one
        )
        self.on_connected: Callable[[], None] = lambda: None
        self._client = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id,
            clean_session=True,
            manual_ack=True,
        )
        if url.user is not None:
            self._client.username_pw_set(url.user, url.password)
        if url.tls:
            self._client.tls_set()
        self._client.reconnect_delay_set(min_delay=1, max_delay=15)
        self._client.on_connect = self._connected
        self._client.on_disconnect = self._disconnected
        self._client.on_message = self._message

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""
        return self._client.is_connected()

    def start(self) -> None:
        """Begin to connect in the background."""
        self._client.connect_async(self._url.host, self._url.port, keepalive=KEEPALIVE)
        self._client.loop_start()

    def stop(self) -> None:
        """Disconnect and end the network thread."""
        self._stopping.set()
        self._client.disconnect()
        self._client.loop_stop()

    async def receive(self) -> Incoming:
        """The next message; call its `done` when it is dealt with."""
        return await self._queue.get()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Send at QoS 1, or drop it when there is no connection: everything the server says is asked for again."""
        if self.connected:
            self._client.publish(topic, payload, qos=1, retain=retain)

    # Called in paho's thread.

    def _connected(
        self, client: paho.Client, data: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        if reason.is_failure:
            log.warning("broker %s:%d refused: %s", self._url.host, self._url.port, reason)
            return
        self._generation += 1
        client.subscribe([(f, 1) for f in self._filters])
        log.info("connected to broker %s:%d", self._url.host, self._url.port)
        self._call(lambda: self.on_connected())

    def _disconnected(
        self, client: paho.Client, data: Any, flags: Any, reason: Any, properties: Any
    ) -> None:
        if not self._stopping.is_set():
            log.warning("lost the broker %s:%d: %s", self._url.host, self._url.port, reason)

    def _message(self, client: paho.Client, data: Any, message: paho.MQTTMessage) -> None:
        while not self._room.acquire(timeout=0.2):
            if self._stopping.is_set():
                return
        generation, mid, qos = self._generation, message.mid, message.qos

        def done() -> None:
            if generation == self._generation:
                client.ack(mid, qos)
            self._room.release()

        incoming = Incoming(
            topic=message.topic,
            payload=bytes(message.payload),
            retained=message.retain,
            done=done,
        )
        self._call(lambda: self._queue.put_nowait(incoming))

    def _call(self, function: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(function)
        except RuntimeError:  # the loop is closed: the server is ending
            self._stopping.set()
