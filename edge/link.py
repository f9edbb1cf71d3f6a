"""The MQTT side of a device: paho's network thread in front, one queue of events behind.

Nothing here decides anything; messages are parsed and handed over, and a lost connection comes back by itself.
"""

from __future__ import annotations

import logging
import queue
import random
import time
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import paho.mqtt.client as mqtt
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from protocol import messages, topics

log = logging.getLogger(__name__)
KEEPALIVE = 60  # a training step holds the interpreter for seconds on a slow or busy device


class LinkError(RuntimeError):
    """A broker address that cannot be used."""


@dataclass(frozen=True)
class Connected:
    """The broker is there (again); whatever was in flight may be lost."""


Event = (
    Connected
    | messages.Lease
    | messages.Grant
    | messages.Receipt
    | messages.RunOver
    | messages.RoundInfo
)


@dataclass
class Link:
    """A connection to `broker` (`mqtt://host:port`, or `mqtts://`) as `device`; a context manager."""

    broker: str
    fleet: str
    device: str
    events: queue.Queue[Event] = field(default_factory=queue.Queue)
    bytes_up: int = 0
    _since: float = field(default_factory=time.monotonic)
    _flying: dict[tuple[str, int], mqtt.MQTTMessageInfo] = field(default_factory=dict)

    def __enter__(self) -> Link:
        parts = urlsplit(self.broker)
        try:
            host, port = parts.hostname, parts.port or (8883 if parts.scheme == "mqtts" else 1883)
        except ValueError as error:
            raise LinkError(f"broker {self.broker!r}: {error}") from error
        if parts.scheme not in ("mqtt", "mqtts") or not host:
            raise LinkError(f"broker {self.broker!r}: mqtt://HOST:PORT or mqtts:// wanted")
        # 3.1.1, which every broker speaks. Sessions are clean: every message here is repeated until answered, so that
        # nothing has to be kept by a broker that may itself be restarted.
        client = mqtt.Client(
            CallbackAPIVersion.VERSION2,
            client_id=self.device,
            protocol=MQTTProtocolVersion.MQTTv311,
            clean_session=True,
        )
        gone = messages.Status(device=self.device, state="offline")
        client.will_set(
            topics.status(self.fleet, self.device), messages.encode(gone), qos=1, retain=True
        )
        if parts.scheme == "mqtts":
            client.tls_set()  # the system's certificate authorities
        client.on_connect = self._on_connect
        client.on_disconnect = self._on_disconnect
        client.on_message = self._on_message
        self._jitter(client)
        client.connect_async(host, port, KEEPALIVE)
        self._client = client
        client.loop_start()
        return self

    def __exit__(self, *_: object) -> None:
        gone = messages.Status(device=self.device, state="offline")
        if self._client.is_connected():
            info = self._client.publish(
                topics.status(self.fleet, self.device), messages.encode(gone), qos=1, retain=True
            )
            try:
                info.wait_for_publish(2)
            except (RuntimeError, ValueError):
                pass  # then the last will says it
        self._client.disconnect()
        self._client.loop_stop()

    @staticmethod
    def _jitter(client: mqtt.Client) -> None:
        # A fleet that lost its broker must not come back in step. paho waits twice as long after each failure.
        first: Any = random.uniform(0.3, 1.5)
        client.reconnect_delay_set(first, random.uniform(8, 15))  # type: ignore[arg-type]

    def _on_connect(self, client: mqtt.Client, _: Any, __: Any, code: Any, ___: Any) -> None:
        if code.is_failure:
            log.warning("broker %s refuses: %s", self.broker, code)
            return
        self._since = 0.0
        client.subscribe(
            [
                (topics.down_ctl(self.fleet, self.device), 1),
                (topics.down_receipt(self.fleet, self.device), 1),
                (topics.round_info(self.fleet), 1),
            ]
        )
        here = messages.Status(device=self.device, state="online")
        client.publish(
            topics.status(self.fleet, self.device), messages.encode(here), qos=1, retain=True
        )
        log.info("connected to broker %s", self.broker)
        self.events.put(Connected())

    def _on_disconnect(self, client: mqtt.Client, _: Any, __: Any, code: Any, ___: Any) -> None:
        if not self._since:
            self._since = time.monotonic()
            if code.is_failure:
                log.warning("broker %s lost (%s), reconnecting", self.broker, code)
                self._jitter(client)

    def _on_message(self, _: mqtt.Client, __: Any, message: mqtt.MQTTMessage) -> None:
        try:
            found = messages.decode(bytes(message.payload))
        except messages.MessageError as error:
            log.warning("%s: ignored: %s", message.topic, error)
            return
        if isinstance(
            found,
            messages.Lease
            | messages.Grant
            | messages.Receipt
            | messages.RunOver
            | messages.RoundInfo,
        ):
            self.events.put(found)
        else:
            log.warning("%s: a device does not expect a %s", message.topic, found.kind)

    def lost_for(self) -> float:
        """Seconds without a broker."""
        return time.monotonic() - self._since if self._since else 0.0

    def say(self, message: messages.Ready | messages.Offer) -> None:
        """Send a control message; dropped while there is no broker, since it is repeated anyway."""
        if self._client.is_connected():
            self._client.publish(
                topics.up_ctl(self.fleet, self.device), messages.encode(message), qos=1
            )

    def send_chunk(self, xfer: str, index: int, data: bytes) -> None:
        """Send one chunk; see `sent`."""
        topic = topics.up_chunk(self.fleet, self.device, xfer, index)
        self._flying[xfer, index] = self._client.publish(topic, data, qos=1)
        self.bytes_up += len(data)

    def sent(self) -> list[tuple[str, int]]:
        """Chunks that the broker has taken since the last call. It is no sign that the server has them."""
        done = []
        for key, info in list(self._flying.items()):
            try:
                left = info.is_published()
            except (RuntimeError, ValueError):
                left = True  # refused by paho itself: the server will ask for it
            if left:
                del self._flying[key]
                done.append(key)
        return done

    def forget_chunks(self) -> None:
        """Forget what was in flight before a reconnection."""
        self._flying.clear()

    def next_event(self, timeout: float) -> Event | None:
        """Wait for the next event; None after `timeout` seconds."""
        try:
            return self.events.get(timeout=timeout) if timeout else self.events.get_nowait()
        except queue.Empty:
            return None
