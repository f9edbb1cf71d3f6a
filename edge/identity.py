"""Who this device is: its id and the token that proves it, kept in the work folder. One process uses a folder."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from pathlib import Path

from protocol import topics


class IdentityError(ValueError):
    """A device id or a work folder that cannot be used."""


class Identity:
    """`device.json` in the work folder; a context manager that holds the folder's lock.

    Parameters
    ----------
    wanted : the device id asked for; None takes the remembered one, or draws one after `profile`
    server : a token is only good for the server that gave it
    """

    def __init__(self, folder: Path, wanted: str | None, profile: str, server: str) -> None:
        self.folder, self.server = folder, server
        self.token: str | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(folder / "lock", "w", encoding="ascii")
        except OSError as error:
            raise IdentityError(f"--workdir {folder}: {error}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise IdentityError(f"--workdir {folder}: another edge process is using it") from error
        known = self._read()
        self.device = wanted or known.get("device") or f"{profile}-{secrets.token_hex(3)}"
        if not topics.ID.fullmatch(self.device):
            self._lock.close()
            raise IdentityError(
                f"device id {self.device!r}: up to 64 letters, digits, - and _ wanted"
            )
        if known.get("device") == self.device and known.get("server") == server:
            self.token = known.get("token")

    def _read(self) -> dict[str, str]:
        try:
            value = json.loads((self.folder / "device.json").read_bytes())
        except (OSError, ValueError):
            return {}
        strings = isinstance(value, dict) and all(isinstance(v, str) for v in value.values())
        return value if strings else {}

    def remember(self, token: str) -> None:
        """Keep the token for the next start."""
        self.token = token
        value = {"device": self.device, "server": self.server, "token": token}
        temporary = self.folder / "device.json.tmp"
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            json.dump(value, file)
        os.replace(temporary, self.folder / "device.json")

    def __enter__(self) -> Identity:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.close()
