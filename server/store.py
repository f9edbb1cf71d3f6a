"""What must survive a crash: one SQLite file (WAL). Every method is one transaction; calls take milliseconds.

Order of every change: files first (os.replace), then the transaction that makes them count.
"""

from __future__ import annotations

import fcntl
import json
import secrets
import sqlite3
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from protocol import messages, schema, tensors
from protocol.messages import Lease
from protocol.update import Facts

_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS devices (
    device TEXT PRIMARY KEY, profile TEXT NOT NULL, token TEXT NOT NULL, rows INTEGER NOT NULL,
    last_seen REAL NOT NULL, value BLOB);
CREATE TABLE IF NOT EXISTS leases (
    lease TEXT PRIMARY KEY, round INTEGER NOT NULL, device TEXT NOT NULL, message TEXT NOT NULL,
    state TEXT NOT NULL, reason TEXT NOT NULL DEFAULT '', bytes INTEGER NOT NULL DEFAULT 0,
    weight REAL NOT NULL DEFAULT 0, facts TEXT);
CREATE INDEX IF NOT EXISTS leases_round ON leases (round);
CREATE TABLE IF NOT EXISTS rejections (round INTEGER NOT NULL, device TEXT NOT NULL, reason TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS history (round INTEGER PRIMARY KEY, line TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS counts (id INTEGER PRIMARY KEY CHECK (id = 0), trained BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS experts (id INTEGER PRIMARY KEY CHECK (id = 0), version BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS activations (device TEXT PRIMARY KEY, activation BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS structures (device TEXT PRIMARY KEY, state TEXT NOT NULL);
"""


class StateError(ValueError):
    """A state directory that cannot be used."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """A registered device."""

    device: str
    profile: str
    token: str
    rows: int
    last_seen: float


@dataclass(frozen=True, kw_only=True)
class LeaseRow:
    """A lease and what became of it: "open", "accepted", "rejected" or "missing"."""

    lease: Lease
    device: str
    state: str
    reason: str
    bytes: int
    weight: float
    facts: Facts | None


class Store:
    """Open `folder/state.sqlite`, creating it when absent.

    Raises
    ------
    StateError
        Not a database, the state of another base, or in use by another server.
    """

    def __init__(self, folder: Path, base: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # Released by the kernel when we die, however we die.
        self._lock = open(folder / "lock", "wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise StateError(f"{folder}: another server is using this state") from error
        path = folder / "state.sqlite"
        try:
            self._db = _connect(path)
        except sqlite3.DatabaseError as error:
            self._lock.close()
            raise StateError(f"{path}: {error}") from error
        known = self.get("base")
        if known is not None and known != base:
            self.close()
            raise StateError(f"{folder}: state of base {known[:16]}, the store has {base[:16]}")
        if known is None:
            self._many(
                ("INSERT INTO meta VALUES ('base', ?)", (base,)),
                ("INSERT INTO meta VALUES ('run', ?)", (secrets.token_hex(4),)),
            )

    def close(self) -> None:
        """Close the database and let others use the folder."""
        self._db.close()
        self._lock.close()

    def _many(self, *statements: tuple[str, tuple[Any, ...]]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for sql, values in statements:
                self._db.execute(sql, values)
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def get(self, key: str) -> str | None:
        """A value of the run: base, run, round, phase, version, opened, broker_port."""
        row = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return None if row is None else str(row[0])

    def put(self, **values: str | int | float) -> None:
        """Set values of the run."""
        self._many(*(_put(key, value) for key, value in values.items()))

    @property
    def run(self) -> str:
        """Id of this run, drawn when the state was created."""
        return str(self.get("run"))

    def number(self, key: str) -> int:
        """An integer value, 0 when absent."""
        return int(self.get(key) or 0)

    # Devices

    def device(self, device: str) -> Device | None:
        """A device, None when it never registered."""
        row = self._db.execute(
            "SELECT device, profile, token, rows, last_seen FROM devices WHERE device = ?",
            (device,),
        ).fetchone()
        return None if row is None else _device(row)

    def devices(self) -> dict[str, Device]:
        """All devices by id, sorted."""
        rows = self._db.execute(
            "SELECT device, profile, token, rows, last_seen FROM devices ORDER BY device"
        )
        return {row[0]: _device(row) for row in rows}

    def register(self, device: str, profile: str, rows: int) -> str:
        """Add a device, or refresh its facts; returns its token."""
        self._many(
            (
                "INSERT INTO devices VALUES (?, ?, ?, ?, ?, NULL) ON CONFLICT (device) DO UPDATE SET"
                " profile = excluded.profile, rows = excluded.rows, last_seen = excluded.last_seen",
                (device, profile, secrets.token_hex(32), rows, time.time()),
            )
        )
        known = self.device(device)
        assert known is not None
        return known.token

    def seen(self, device: str, when: float) -> None:
        """Note when a device was last heard of."""
        self._many(("UPDATE devices SET last_seen = ? WHERE device = ?", (when, device)))

    def has_token(self, token: str) -> bool:
        """Whether a device holds this token."""
        rows = self._db.execute("SELECT token FROM devices").fetchall()
        return any(secrets.compare_digest(token.encode(), str(row[0]).encode()) for row in rows)

    def values(self) -> dict[str, NDArray[np.float64]]:
        """Smoothed expert values [L, E] of the devices that have reported statistics."""
        rows = self._db.execute("SELECT device, value FROM devices WHERE value IS NOT NULL")
        return {row[0]: tensors.decode(row[1])["value"] for row in rows}

    def trained_counts(self) -> NDArray[np.int64] | None:
        """How many accepted updates trained each expert, [L, E]; None before the first."""
        row = self._db.execute("SELECT trained FROM counts").fetchone()
        return None if row is None else tensors.decode(row[0])["trained"]

    def expert_versions(self) -> NDArray[np.int64] | None:
        """Adapter version that last changed each expert, [L, E]; None before the first."""
        row = self._db.execute("SELECT version FROM experts").fetchone()
        return None if row is None else tensors.decode(row[0])["version"]

    def activations(self) -> dict[str, NDArray[np.float64]]:
        """Each device's newest activation matrix [L, E], see `similarity.activation`."""
        rows = self._db.execute("SELECT device, activation FROM activations")
        return {row[0]: tensors.decode(row[1])["activation"] for row in rows}

    def structures(self) -> dict[str, str]:
        """Each device's sub-model as JSON, see `structure.from_json`."""
        return dict(self._db.execute("SELECT device, state FROM structures").fetchall())

    def trained_mass(self) -> NDArray[np.float64] | None:
        """Training of each expert over the rounds, fading, [L, E]; None before the first."""
        row = self._db.execute("SELECT trained FROM counts").fetchone()
        return None if row is None else tensors.decode(row[0]).get("mass")

    # Rounds

    def open_round(
        self,
        round: int,
        leases: Iterable[tuple[str, Lease]],
        structures: Mapping[str, str] | None = None,
    ) -> None:
        """Make a round, its leases and the sub-models that they begin count."""
        inserts: list[tuple[str, tuple[Any, ...]]] = [
            (
                "INSERT INTO leases (lease, round, device, message, state) VALUES (?, ?, ?, ?, 'open')",
                (lease.lease, round, device, messages.encode(lease).decode()),
            )
            for device, lease in leases
        ]
        self._many(
            *inserts,
            *_structures(structures),
            _put("round", round),
            _put("phase", "open"),
            _put("opened", time.time()),
        )

    def leases(self, round: int) -> dict[str, LeaseRow]:
        """Leases of a round by device, sorted."""
        rows = self._db.execute(
            f"SELECT {_LEASE} FROM leases WHERE round = ? ORDER BY device", (round,)
        )
        return {row[1]: _lease_row(row) for row in rows}

    def lease(self, lease: str) -> LeaseRow | None:
        """A lease by id."""
        row = self._db.execute(f"SELECT {_LEASE} FROM leases WHERE lease = ?", (lease,)).fetchone()
        return None if row is None else _lease_row(row)

    def last_leases(self) -> dict[str, Lease]:
        """Each device's latest lease, whatever became of it."""
        rows = self._db.execute("SELECT device, message, max(round) FROM leases GROUP BY device")
        return {row[0]: messages.expect(Lease, row[1].encode()) for row in rows}

    def accepted(self) -> list[LeaseRow]:
        """All accepted leases of the run in the order of their rounds."""
        rows = self._db.execute(
            f"SELECT {_LEASE} FROM leases WHERE state = 'accepted' ORDER BY round, device"
        )
        return [_lease_row(row) for row in rows]

    def accept(self, lease: str, size: int, weight: float, facts: Facts) -> None:
        """Make an update count; its file is on disk already."""
        text = json.dumps(schema.to_dict(facts))
        self._many(
            (
                "UPDATE leases SET state = 'accepted', bytes = ?, weight = ?, facts = ?"
                " WHERE lease = ? AND state = 'open'",
                (size, weight, text, lease),
            )
        )

    def reject(self, round: int, device: str, reason: str, lease: str | None = None) -> None:
        """Note a refusal; with `lease`, that lease is over."""
        statements: list[tuple[str, tuple[Any, ...]]] = [
            ("INSERT INTO rejections VALUES (?, ?, ?)", (round, device, reason))
        ]
        if lease is not None:
            statements.append(
                (
                    "UPDATE leases SET state = 'rejected', reason = ? WHERE lease = ? AND state = 'open'",
                    (reason, lease),
                )
            )
        self._many(*statements)

    def rejections(self, round: int | None = None) -> list[dict[str, str]]:
        """What was refused, in one round or in all."""
        rows = self._db.execute(
            "SELECT device, reason FROM rejections WHERE round = ? OR ? IS NULL ORDER BY rowid",
            (round, round),
        )
        return [{"device": row[0], "reason": row[1]} for row in rows]

    def close_round(
        self,
        round: int,
        version: int,
        line: str,
        values: dict[str, NDArray[np.float64]],
        trained: NDArray[np.int64],
        mass: NDArray[np.float64],
        over: bool,
        activations: Mapping[str, NDArray[np.float64]] | None = None,
        expert_versions: NDArray[np.int64] | None = None,
        structures: Mapping[str, str] | None = None,
    ) -> None:
        """Make the result of a round count: version, statistics, history, end of its leases; all or nothing."""
        scores: list[tuple[str, tuple[Any, ...]]] = [
            (
                "UPDATE devices SET value = ? WHERE device = ?",
                (tensors.encode({"value": v}), device),
            )
            for device, v in values.items()
        ]
        scores += [
            (
                "INSERT OR REPLACE INTO activations VALUES (?, ?)",
                (device, tensors.encode({"activation": a})),
            )
            for device, a in (activations or {}).items()
        ]
        if expert_versions is not None:
            blob = tensors.encode({"version": expert_versions})
            scores.append(("INSERT OR REPLACE INTO experts VALUES (0, ?)", (blob,)))
        self._many(
            *scores,
            *_structures(structures),
            (
                "INSERT OR REPLACE INTO counts VALUES (0, ?)",
                (tensors.encode({"trained": trained, "mass": mass}),),
            ),
            (
                "UPDATE leases SET state = 'missing', reason = 'stale' WHERE round = ? AND state = 'open'",
                (round,),
            ),
            ("INSERT INTO history VALUES (?, ?)", (round, line)),
            _put("round", round + 1),
            _put("phase", "over" if over else "waiting"),
            _put("version", version),
        )

    def history(self) -> list[str]:
        """Lines of all closed rounds."""
        return [str(r[0]) for r in self._db.execute("SELECT line FROM history ORDER BY round")]


_LEASE = "message, device, state, reason, bytes, weight, facts"


def _connect(path: Path) -> sqlite3.Connection:
    # check_same_thread: used from the event loop only, but closed from wherever it ends.
    db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
    try:
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.executescript(_SCHEMA)
    except sqlite3.DatabaseError:
        db.close()
        raise
    return db


def _structures(states: Mapping[str, str] | None) -> list[tuple[str, tuple[Any, ...]]]:
    sql = "INSERT OR REPLACE INTO structures VALUES (?, ?)"
    return [(sql, (device, state)) for device, state in (states or {}).items()]


def _put(key: str, value: str | int | float) -> tuple[str, tuple[Any, ...]]:
    return "INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, str(value))


def _device(row: tuple[Any, ...]) -> Device:
    return Device(device=row[0], profile=row[1], token=row[2], rows=row[3], last_seen=row[4])


def _lease_row(row: tuple[Any, ...]) -> LeaseRow:
    return LeaseRow(
        lease=messages.expect(Lease, row[0].encode()),
        device=row[1],
        state=row[2],
        reason=row[3],
        bytes=row[4],
        weight=row[5],
        facts=None if row[6] is None else schema.from_dict(Facts, json.loads(row[6]), "facts"),
    )
