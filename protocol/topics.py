"""MQTT topics. The only place where topic strings appear.

fl/v1/{fleet}/{device}/status        retained, last will "offline"
fl/v1/{fleet}/{device}/up/ctl        device -> server: Ready, Offer
fl/v1/{fleet}/{device}/up/{xfer}/{i} device -> server: one chunk
fl/v1/{fleet}/{device}/down/ctl      server -> device: Lease, Grant, RunOver
fl/v1/{fleet}/{device}/down/rcpt     server -> device: Receipt
fl/v1/{fleet}/round                  retained RoundInfo
"""

from __future__ import annotations

import re
from dataclasses import dataclass

ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_UP = re.compile(
    r"fl/v1/([A-Za-z0-9_-]{1,64})/([A-Za-z0-9_-]{1,64})/"
    r"(status|up/ctl|up/([A-Za-z0-9_-]{1,64})/(\d{1,7}))"
)


@dataclass(frozen=True)
class UpTopic:
    """A parsed topic that a device writes to. `kind` is "status", "ctl" or "chunk"."""

    fleet: str
    device: str
    kind: str
    xfer: str = ""
    index: int = -1


def status(fleet: str, device: str) -> str:
    """Retained state of a device."""
    return f"fl/v1/{fleet}/{device}/status"


def up_ctl(fleet: str, device: str) -> str:
    """Control messages of a device."""
    return f"fl/v1/{fleet}/{device}/up/ctl"


def up_chunk(fleet: str, device: str, xfer: str, index: int) -> str:
    """One chunk of an upload."""
    return f"fl/v1/{fleet}/{device}/up/{xfer}/{index}"


def down_ctl(fleet: str, device: str) -> str:
    """Control messages for a device."""
    return f"fl/v1/{fleet}/{device}/down/ctl"


def down_receipt(fleet: str, device: str) -> str:
    """Receipts for a device's chunks."""
    return f"fl/v1/{fleet}/{device}/down/rcpt"


def round_info(fleet: str) -> str:
    """Retained: what the run is doing now."""
    return f"fl/v1/{fleet}/round"


def server_filters(fleet: str) -> list[str]:
    """What the server subscribes to."""
    return [f"fl/v1/{fleet}/+/status", f"fl/v1/{fleet}/+/up/ctl", f"fl/v1/{fleet}/+/up/+/+"]


def parse_up(topic: str) -> UpTopic | None:
    """Read a topic that a device wrote to; None for any other topic.

    >>> parse_up("fl/v1/home/pixel-1/up/x7/12")
    UpTopic(fleet='home', device='pixel-1', kind='chunk', xfer='x7', index=12)
    >>> parse_up("fl/v1/home/pixel-1/down/ctl") is None
    True
    """
    match = _UP.fullmatch(topic)
    if match is None:
        return None
    if match[3] == "status":
        return UpTopic(match[1], match[2], "status")
    if match[3] == "up/ctl":
        return UpTopic(match[1], match[2], "ctl")
    return UpTopic(match[1], match[2], "chunk", match[4], int(match[5]))
