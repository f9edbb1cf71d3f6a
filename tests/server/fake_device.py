"""A device that speaks the real protocol over the real broker, and makes its updates up."""

from __future__ import annotations

import hashlib
import json
import queue
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion

from protocol import PROTOCOL_VERSION, chunks, messages, names, tensors, topics, update, uplink
from protocol.manifest import BaseIndex, Shape
from protocol.messages import (
    Grant,
    Lease,
    Offer,
    Ready,
    Receipt,
    Register,
    RunOver,
    Status,
    Welcome,
)
from server.mqtt import parse_url

FACTS = update.Facts(
    rows=10, tokens=64, steps=2, loss_first=2.0, loss_last=1.0, accuracy_before=0.25,
    accuracy_after=0.5, loss_before=2.0, loss_after=1.0, held_back_rows=4, missed_mass=(0.1, 0.1),
    backend="fake", baseline_bytes=10, peak_bytes=20, budget_bytes=30, seconds=0.1, bytes_down=5,
)  # fmt: skip


def ranks(lease: Lease, shape: Shape) -> dict[tuple[int, int], int]:
    """(layer, expert) -> rank of the slot that the lease puts it in."""
    return {
        (int(layer), e): slots[i].rank
        for (layer, held), slots in zip(sorted(lease.resident.items()), shape.slots, strict=True)
        for i, e in enumerate(held)
    }


def made_up_tensors(lease: Lease, base: BaseIndex, shape: Shape, seed: int) -> dict:
    """Plausible new values for what the lease trains."""
    rng = np.random.default_rng([seed, lease.round])
    rank_of = ranks(lease, shape)
    made = {}
    for layer, experts in lease.trained.items():
        for e in experts:
            rank = rank_of[int(layer), e]
            for p in base.projections:
                out, into = base.features(p)
                made[names.lora(int(layer), e, p, "lora_A")] = rng.normal(
                    size=(rank, into), scale=0.1
                )
                made[names.lora(int(layer), e, p, "lora_B")] = rng.normal(
                    size=(out, rank), scale=0.1
                )
            made[names.router_row(int(layer), e)] = rng.normal(size=base.hidden, scale=0.01)
    return {k: v.astype(np.float32) for k, v in made.items()}


def made_up_stats(lease: Lease, base: BaseIndex, tokens: int, seed: int) -> dict:
    """Statistics of `tokens` random tokens."""
    rng = np.random.default_rng([seed, 7])
    layers, experts = len(base.moe_layers), base.num_experts
    g = rng.dirichlet(np.ones(experts) * 0.3, (layers, tokens))
    top = g >= np.sort(g, -1)[..., -base.top_k :][..., :1]
    stats = {
        "mass": g.sum(1),
        "top": (g * top).sum(1),
        "g_log_g": (g * np.log(np.maximum(g, 1e-30))).sum(1),
        **{n: np.zeros((layers, experts)) for n in ("output_norm", "trained_tokens", "taylor")},
        "peak": g.max(1),
        "high": np.sort(g, 1)[:, -2],
        "label_information": np.zeros((layers, experts)),
    }
    for i, layer in enumerate(base.moe_layers):
        held, trained = list(lease.resident[str(layer)]), list(lease.trained.get(str(layer), ()))
        stats["output_norm"][i, held] = stats["top"][i, held] * rng.uniform(0.5, 2)
        stats["taylor"][i, held] = stats["top"][i, held]
        stats["trained_tokens"][i, trained] = rng.integers(1, 20, len(trained))
    return {k: v.astype(np.float32) for k, v in stats.items()}


class FakeDevice:
    """Every step of the protocol as a method that blocks, at most `patience` seconds."""

    def __init__(
        self,
        url: str,
        device: str,
        profile: str,
        base: BaseIndex,
        shape: Shape | None,
        patience: float = 60.0,
    ):
        self.url, self.device, self.profile, self.base, self.shape = (
            url,
            device,
            profile,
            base,
            shape,
        )
        self.patience = patience
        self.seed = int.from_bytes(hashlib.sha256(device.encode()).digest()[:4], "little")
        self.welcome: Welcome | None = None
        self.inbox: queue.Queue = queue.Queue()
        self.client: paho.Client | None = None
        self.adapters: dict[int, dict] = {}

    # HTTP

    def get(self, path: str, headers: dict | None = None) -> bytes:
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=headers or {}), timeout=60
        ) as r:
            return r.read()

    def register(self, token: str | None = None) -> Welcome:
        body = messages.encode(
            Register(
                protocol=PROTOCOL_VERSION,
                device=self.device,
                profile=self.profile,
                token=token,
                rows=10,
            )
        )
        request = urllib.request.Request(self.url + "/v1/devices", data=body, method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            self.welcome = messages.expect(Welcome, response.read())
        return self.welcome

    # MQTT

    def connect(self) -> None:
        assert self.welcome is not None
        fleet = self.welcome.fleet
        client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id=self.device, clean_session=False
        )
        gone = messages.encode(Status(device=self.device, state="offline"))
        client.will_set(topics.status(fleet, self.device), gone, qos=1, retain=True)
        client.reconnect_delay_set(1, 1)
        subscribed = queue.Queue()

        def on_connect(c, *_):
            c.subscribe(
                [
                    (topics.down_ctl(fleet, self.device), 1),
                    (topics.down_receipt(fleet, self.device), 1),
                ]
            )
            c.publish(
                topics.status(fleet, self.device),
                messages.encode(Status(device=self.device, state="online")), qos=1, retain=True,
            )  # fmt: skip

        client.on_connect = on_connect
        client.on_subscribe = lambda *_: subscribed.put(True)
        client.on_message = lambda c, d, m: self.inbox.put(messages.decode(m.payload))
        broker = parse_url(self.welcome.broker)
        client.connect_async(broker.host, broker.port, keepalive=10)
        client.loop_start()
        subscribed.get(timeout=self.patience)
        self.client = client

    def start(self) -> FakeDevice:
        self.register()
        self.connect()
        return self

    def stop(self) -> None:
        """Leave in an orderly way."""
        if self.client is not None and self.welcome is not None:
            gone = messages.encode(Status(device=self.device, state="offline"))
            self.client.publish(
                topics.status(self.welcome.fleet, self.device), gone, qos=1, retain=True
            )
            time.sleep(0.05)
        self.vanish()

    def vanish(self) -> None:
        """Be gone without a word."""
        if self.client is not None:
            self.client.loop_stop()
            sock = self.client.socket()
            if sock is not None:
                sock.close()
            self.client = None

    def say(self, message: Ready | Offer) -> None:
        assert self.client is not None
        assert self.welcome is not None
        self.client.publish(
            topics.up_ctl(self.welcome.fleet, self.device), messages.encode(message), qos=1
        )

    def raw(self, topic: str, payload: bytes) -> None:
        assert self.client is not None
        self.client.publish(topic, payload, qos=1)

    def ready(self) -> None:
        assert self.welcome is not None
        self.say(Ready(device=self.device, run=self.welcome.run))

    def wait(
        self,
        kind: type,
        match: Callable = lambda m: True,
        again: Callable | None = None,
        every: float = 1.0,
    ):
        """The next matching message; others are dropped. `again` is called every `every` seconds."""
        end = time.monotonic() + self.patience
        while (left := end - time.monotonic()) > 0:
            try:
                message = self.inbox.get(timeout=min(left, every))
            except queue.Empty:
                if again:
                    again()
                continue
            if isinstance(message, kind) and match(message):
                return message
        raise TimeoutError(f"{self.device}: no {kind} within {self.patience} s")

    def lease(self) -> Lease | RunOver:
        """Say Ready until there is work or the run is over."""
        self.ready()
        return self.wait(Lease | RunOver, again=self.ready)

    def fetch_adapter(self, lease: Lease) -> dict:
        data = self.get(f"/v1/blobs/{lease.adapter.sha256}")
        assert hashlib.sha256(data).hexdigest() == lease.adapter.sha256
        found = tensors.decode(data)
        return tensors.widened(found) if lease.downlink == "float16" else found

    def check_adapter(self, lease: Lease) -> None:
        """The slice has what the slots take, no more and no less."""
        found, wanted = self.adapters[lease.round], {}
        found = {n: v for n, v in found.items() if n.startswith("layers.")}
        assert self.shape is not None
        for (layer, e), rank in ranks(lease, self.shape).items():
            wanted[names.router_row(layer, e)] = (self.base.hidden,)
            for p in self.base.projections if rank else ():
                out, into = self.base.features(p)
                wanted[names.lora(layer, e, p, "lora_A")] = (rank, into)
                wanted[names.lora(layer, e, p, "lora_B")] = (out, rank)
        assert {name: value.shape for name, value in found.items()} == wanted

    def made_up_update(self, lease: Lease, **facts) -> bytes:
        assert self.shape is not None
        made = made_up_tensors(lease, self.base, self.shape, self.seed)
        made = {n: v for n, v in made.items() if lease.objective.sends(n)}
        control = {f"scaffold.{n}": np.full_like(v, 0.1) for n, v in made.items()}
        if lease.uplink != "float32" and made:
            leased = self.adapters.get(lease.round) or self.fetch_adapter(lease)
            made = {n: v - leased[n] for n, v in made.items()}
        if lease.objective.scaffold:
            made |= control
        if lease.uplink != "float32" and made:
            made = uplink.encode(made, lease.uplink)
        return update.pack(
            made,
            made_up_stats(lease, self.base, FACTS.tokens, self.seed),
            replace(FACTS, **facts),
        )

    def offer(self, lease: Lease, data: bytes) -> Offer:
        assert self.welcome is not None
        sha256 = hashlib.sha256(data).hexdigest()
        return Offer(
            lease=lease.lease,
            device=self.device,
            bytes=len(data),
            sha256=sha256,
            mac=messages.sign(self.welcome.token, lease.lease, lease.nonce, sha256, len(data)),
        )

    def grant(self, lease: Lease, data: bytes) -> Grant | Receipt:
        offer = self.offer(lease, data)
        self.say(offer)
        ours = lambda m: m.lease == lease.lease and (isinstance(m, Grant) or m.final)  # noqa: E731
        return self.wait(Grant | Receipt, ours, again=lambda: self.say(offer))

    def send_chunk(self, grant: Grant, data: bytes, index: int) -> None:
        assert self.welcome is not None
        topic = topics.up_chunk(self.welcome.fleet, self.device, grant.xfer, index)
        self.raw(topic, chunks.cut(data, index, grant.chunk_bytes))

    def final(self, lease: Lease, data: bytes, grant: Grant) -> Receipt:
        """Answer receipts until the final one."""
        while True:
            receipt = self.wait(
                Receipt,
                lambda r: r.lease == lease.lease,
                again=lambda: self.say(self.offer(lease, data)),
            )
            if receipt.final:
                return receipt
            for index in receipt.missing:
                self.send_chunk(grant, data, index)

    def deliver(self, lease: Lease, data: bytes) -> Receipt:
        grant = self.grant(lease, data)
        if isinstance(grant, Receipt):
            return grant
        for index in range(chunks.count(len(data), grant.chunk_bytes)):
            self.send_chunk(grant, data, index)
        return self.final(lease, data, grant)

    def work_until_over(self) -> list[Lease]:
        """The whole life of a good device."""
        leases = []
        while isinstance(lease := self.lease(), Lease):
            if leases and leases[-1].lease == lease.lease:
                continue
            self.adapters[lease.round] = self.fetch_adapter(lease)
            self.check_adapter(lease)
            receipt = self.deliver(lease, self.made_up_update(lease))
            assert receipt.accepted, receipt
            leases.append(lease)
        return leases


def http_error(call: Callable) -> tuple[int, str]:
    """Status and message of a refused request."""
    try:
        call()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]
    raise AssertionError("not refused")
