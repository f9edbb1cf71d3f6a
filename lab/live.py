"""What is going on, while it goes on: a table that redraws itself on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text


def fetch_status(url: str) -> dict[str, Any] | None:
    """GET /v1/run, or None while the server does not answer."""
    try:
        with urllib.request.urlopen(f"{url}/v1/run", timeout=3) as answer:
            status = json.loads(answer.read())
    except (OSError, ValueError):
        return None
    return status if isinstance(status, dict) else None


def megabytes(size: float) -> str:
    """10**6 bytes, one place.

    >>> megabytes(12_345_678)
    '12.3'
    """
    return f"{size / 1e6:.1f}"


def mebibytes(size: float) -> str:
    """2**20 bytes, one place, as memory is counted.

    >>> mebibytes(3 << 20)
    '3.0'
    """
    return f"{size / 2**20:.1f}"


def percent(value: float | None) -> str:
    """A share as a percentage; a dash for what was not measured (None, or below 0).

    >>> percent(0.5), percent(None), percent(-1.0)
    ('50.0%', '-', '-')
    """
    return "-" if value is None or value < 0 else f"{100 * value:.1f}%"


def headline(status: Mapping[str, Any], scores: Mapping[int, float]) -> str:
    """One line about the run."""
    # The rounds before and after training measure; they are not among those that were asked for.
    trains = 1 <= status["round"] <= status["rounds"]
    line = f"round {status['round']} of {status['rounds']}, " if trains else ""
    line += str(status["state"])
    line += f", adapter {status['version']}"
    if scores:
        line += f", global accuracy {percent(scores[max(scores)])} (adapter {max(scores)})"
    return line


def render(status: Mapping[str, Any], scores: Mapping[int, float]) -> Group:
    """The live table."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("device", "profile", "state", "experts"):
        table.add_column(name, no_wrap=True)
    for name in ("peak / budget MB", "down MB", "up MB", "accuracy", "loss"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, device in sorted(status["devices"].items()):
        held = [len(ids) for _, ids in sorted((device.get("resident") or {}).items())]
        peak, budget = device.get("peak_bytes") or 0, device.get("budget_bytes") or 0
        loss = device.get("loss_last")
        state = str(device.get("work") or device.get("state") or "")
        table.add_row(
            name,
            str(device["profile"]),
            Text(state if device["online"] else "offline", "" if device["online"] else "red"),
            "+".join(map(str, held)) or "-",
            Text(
                f"{mebibytes(peak)} / {mebibytes(budget)}" if budget else "-",
                "red" if budget and peak > budget else "",
            ),
            megabytes(device.get("bytes_down") or 0),
            megabytes(device.get("bytes_up") or 0),
            percent(device.get("accuracy_last")),
            "-" if loss is None or loss < 0 else f"{loss:.2f}",
        )
    return Group(Text(headline(status, scores), style="bold"), table)


class View:
    """Shows statuses as they come; a context manager."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._live = Live(console=console, refresh_per_second=4) if console.is_terminal else None
        self._said = ""

    def __enter__(self) -> View:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: Mapping[str, Any], scores: Mapping[int, float]) -> None:
        """Redraw, or say one line when something has changed."""
        if self._live is not None:
            self._live.update(render(status, scores))
            return
        line = headline(status, scores)
        if line != self._said:
            self._said = line
            self.console.print(line, highlight=False)

    def say(self, line: str) -> None:
        """A line that stays."""
        self.console.print(line, highlight=False)
