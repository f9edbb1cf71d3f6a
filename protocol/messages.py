"""Everything that is said over MQTT and at registration. Frozen dataclasses, one JSON codec, at most 64 KiB each.

A device's day: POST Register -> Welcome; subscribe; say Ready; get a Lease; fetch blobs; train; say Offer; get a
Grant; send chunks; get Receipts until one is final; say Ready again; RunOver ends it.
Required facts are always in the payload, so that MQTT 3.1.1 brokers do.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from typing import Literal, TypeVar

from protocol import PROTOCOL_VERSION, schema
from protocol.manifest import Blob
from protocol.objective import Objective

MAX_MESSAGE = 64 << 10


class MessageError(ValueError):
    """A message that cannot be understood."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """What the run teaches. `labels` empty: plain language modelling of `{text}`.

    With labels, a row is `template` with `{text}` filled in, followed by a space and the label. With `answer` "text"
    there are no labels: every row brings its own answer, any text, in its label's place.
    """

    template: str = "Text: {text}\nTopic:"
    labels: tuple[str, ...] = ()
    answer: Literal["label", "text"] = "label"


@dataclass(frozen=True, kw_only=True)
class Register:
    """Device -> server over HTTP: who I am. Asking again with the same `token` is harmless."""

    kind: Literal["register"] = "register"
    protocol: int
    device: str
    profile: str
    token: str | None = None  # the one a former Welcome gave, to prove that it is the same device
    rows: int  # training rows on the device


@dataclass(frozen=True, kw_only=True)
class Welcome:
    """Server -> device over HTTP: where everything is."""

    kind: Literal["welcome"] = "welcome"
    protocol: int
    fleet: str
    run: str
    token: str  # secret of this device: signs its offers
    broker: str  # mqtt://host:port
    base: str  # content hash; GET /v1/base gives the BaseIndex
    task: Task


@dataclass(frozen=True, kw_only=True)
class Ready:
    """Device -> server: idle and able to take a lease."""

    kind: Literal["ready"] = "ready"
    device: str
    run: str


@dataclass(frozen=True, kw_only=True)
class Lease:
    """Server -> device: permission to work from one adapter version until a deadline.

    `work`: "profile" measures accuracy and routing statistics only, "train" trains as well, "evaluate" measures the
    final adapter. `resident` and `trained` map a layer id (as text) to global expert ids, in slot order.
    `adapter` is a safetensors blob with the LoRA factors and router rows of the resident experts, in float32, or in
    float16 (`downlink`): then both sides work from the rounded values. With SCAFFOLD it also holds the control
    variates `scaffold.<name>`, and for the heterogeneity-aware balance `trained_counts` float32 [L, E].

    `profile` says what "profile" measures: "resident" the sub-MoE; "full" the whole model, expert by expert, so that
    the statistics are exact for experts the device does not hold. `profile_rows`: rows to sample for that, 0: the
    device's own choice. `profile_clip`: a row counts at most so many tokens in a layer's statistics, 0: all.
    `profile_noise`: Gaussian noise on them, in units of what one clipped row can change; see `edge.privacy`.
    `profile_adapter`: as `adapter`, of all experts; without it the base is profiled.
    """

    kind: Literal["lease"] = "lease"
    lease: str
    run: str
    round: int
    attempt: int
    work: Literal["profile", "train", "evaluate"]
    base_version: int
    resident: dict[str, tuple[int, ...]]
    trained: dict[str, tuple[int, ...]]
    adapter: Blob
    steps: int
    learning_rate: float
    router_learning_rate: float
    seed: int
    objective: Objective = Objective()
    uplink: Literal["float32", "int8", "int4"] = "float32"  # how the update's factors are coded
    downlink: Literal["float32", "float16"] = "float32"  # of the adapter
    profile: Literal["resident", "full"] = "resident"
    profile_rows: int = 0
    profile_clip: float = 0.0
    profile_noise: float = 0.0
    profile_adapter: Blob | None = None
    seconds: float  # until the deadline, counted from receipt: device clocks are not trusted
    nonce: str

    def __post_init__(self) -> None:
        if not 0 <= self.profile_rows <= 10**7:
            raise schema.SchemaError(f"profile_rows {self.profile_rows}, 0 to 10000000 wanted")
        for name in ("profile_clip", "profile_noise"):
            if not 0 <= getattr(self, name) <= 1e6:
                raise schema.SchemaError(f"{name} {getattr(self, name)}, 0 to 1e6 wanted")
        if self.profile_noise and not self.profile_clip:
            raise schema.SchemaError(
                "profile_noise without profile_clip: a row's share is unbounded"
            )


@dataclass(frozen=True, kw_only=True)
class Offer:
    """Device -> server: an update is ready. `mac` = `sign(token, ...)` over the fields that matter."""

    kind: Literal["offer"] = "offer"
    lease: str
    device: str
    bytes: int
    sha256: str
    mac: str


@dataclass(frozen=True, kw_only=True)
class Grant:
    """Server -> device: send the offered update as `xfer`, `window` chunks of `chunk_bytes` in flight."""

    kind: Literal["grant"] = "grant"
    lease: str
    xfer: str
    chunk_bytes: int
    window: int


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """Server -> device: what is still missing, or the end of an upload.

    `final` with `accepted`: counted (or already counted: a duplicate is harmless). `final` without: never will be;
    `reason` says why. Not final: `missing` lists chunk indices to send (again), at most 1024 at a time; an empty list
    only says that all is well so far.
    """

    kind: Literal["receipt"] = "receipt"
    lease: str
    xfer: str
    missing: tuple[int, ...]
    final: bool
    accepted: bool
    reason: str


@dataclass(frozen=True, kw_only=True)
class RunOver:
    """Server -> device: nothing more to do."""

    kind: Literal["run_over"] = "run_over"
    run: str


@dataclass(frozen=True, kw_only=True)
class RoundInfo:
    """Retained: what the run is doing now."""

    kind: Literal["round"] = "round"
    run: str
    round: int
    base_version: int
    over: bool


@dataclass(frozen=True, kw_only=True)
class Status:
    """Retained: is the device there? "offline" is its last will."""

    kind: Literal["status"] = "status"
    device: str
    state: Literal["online", "offline"]


Message = (
    Register | Welcome | Ready | Lease | Offer | Grant | Receipt | RunOver | RoundInfo | Status
)
M = TypeVar("M", Register, Welcome, Ready, Lease, Offer, Grant, Receipt, RunOver, RoundInfo, Status)
KINDS: dict[str, type[Message]] = {
    c.kind: c
    for c in (Register, Welcome, Ready, Lease, Offer, Grant, Receipt, RunOver, RoundInfo, Status)
}


def encode(message: Message) -> bytes:
    """JSON bytes; the same message gives the same bytes."""
    return json.dumps(schema.to_dict(message), sort_keys=True).encode()


def decode(data: bytes) -> Message:
    """Parse any message; raises MessageError."""
    if len(data) > MAX_MESSAGE:
        raise MessageError(f"message of {len(data)} bytes, at most {MAX_MESSAGE} wanted")
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise MessageError(f"message is not JSON: {error}") from error
    kind = value.get("kind") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise MessageError(f"message of unknown kind {str(kind)[:40]!r}")
    try:
        message = schema.from_dict(KINDS[kind], value, kind)
    except schema.SchemaError as error:
        raise MessageError(str(error)) from error
    version = getattr(message, "protocol", PROTOCOL_VERSION)
    if version != PROTOCOL_VERSION:
        raise MessageError(f"{kind}: protocol {version} found, {PROTOCOL_VERSION} wanted")
    return message


def expect(cls: type[M], data: bytes) -> M:
    """Parse a message that must be of one class; raises MessageError."""
    message = decode(data)
    if not isinstance(message, cls):
        raise MessageError(f"{message.kind} found, {cls.kind} wanted")
    return message


def sign(token: str, lease: str, nonce: str, sha256: str, size: int) -> str:
    """HMAC-SHA256 that binds an update to its lease and to the device that holds `token`."""
    text = f"{lease}\n{nonce}\n{sha256}\n{size}"
    return hmac.new(token.encode(), text.encode(), hashlib.sha256).hexdigest()


def verify(mac: str, token: str, lease: str, nonce: str, sha256: str, size: int) -> bool:
    """Check `sign` in constant time."""
    return hmac.compare_digest(mac.encode(), sign(token, lease, nonce, sha256, size).encode())
