"""What has been sliced so far, on disk: an interrupted build goes on where it stopped, a second one reads no weights.

STORE/slicing.jsonl: one line that names the checkpoint's content and how it is cut, then one line per finished item.
Only whole lines count. One process at a time writes it.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


class Journal:
    """The lines of one key; those of another key are dropped.

    Parameters
    ----------
    key : str
        Hash of everything that decides the bytes of the blobs.
    """

    def __init__(self, path: Path, key: str) -> None:
        self.path, self.key, self._lock = path, key, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "a+b")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("%s: another build is slicing into this store, waiting for it", path)
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self._file.seek(0)
        whole, _, _ = self._file.read().rpartition(b"\n")
        first, *lines = whole.split(b"\n")
        self._items: dict[str, Any] = {}
        # Another checkpoint's lines stay until something of this one is finished.
        self._mine = first == _line({"key": key})
        if self._mine:
            try:
                for line in lines:
                    item = json.loads(line)
                    self._items.setdefault(item["item"], {}).update(item["value"])
            except (ValueError, KeyError, TypeError, RecursionError):
                log.warning("%s: not readable, starting over", path)
                self.restart()
                return
            # What follows the last whole line was being written when its process was killed.
            os.ftruncate(self._file.fileno(), len(whole) + 1)

    def restart(self) -> None:
        """Forget everything."""
        self._items.clear()
        os.ftruncate(self._file.fileno(), 0)
        self._write({"key": self.key})
        self._mine = True

    def get(self, item: str) -> dict[str, Any]:
        """What is known of an item; empty when nothing is."""
        return dict(self._items.get(item, {}))

    def add(self, item: str, value: dict[str, Any]) -> None:
        """Record an item, or more of it."""
        with self._lock:
            if not self._mine:
                self.restart()
            self._items.setdefault(item, {}).update(value)
            self._write({"item": item, "value": value})

    def _write(self, value: dict[str, Any]) -> None:
        # One write in append mode: a killed process leaves at most one broken line, the last.
        os.write(self._file.fileno(), _line(value) + b"\n")

    def close(self) -> None:
        """Let the next process in."""
        self._file.close()


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()
