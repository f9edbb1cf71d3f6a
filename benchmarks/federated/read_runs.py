"""The scoreboard's raw lines: one JSON-lines file per run, `<suite>/<method>/<seed>.jsonl`, checked as it is read.

A run without its "end" line is kept as unfinished and never counted. Its last line may be cut off, as a killed process
leaves it; any other malformed line is an error with its file and line number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

METRICS = ("accuracy", "f1", "rouge2", "answer_loss", "lm_loss")
PRIMARY = ("accuracy", "f1", "rouge2")
"""Fractions in [0, 1], higher is better. The others are losses in nats, lower is better."""
SPLITS = {"global": ("validation", "test"), "device": ("held_back",)}


class RunsError(ValueError):
    """A raw line that does not say what it should; the text has the file and the line."""


@dataclass(frozen=True, kw_only=True)
class Client:
    """What one simulated device was and was given."""

    tasks: tuple[str, ...]
    rows: int
    budget: float
    experts: int
    predicted_bytes: int
    budget_bytes: int


@dataclass(frozen=True, kw_only=True)
class Round:
    """One round of training. A diagnostic that a method does not have is None."""

    round: int
    clients: tuple[str, ...]
    failed: tuple[str, ...]
    bytes_up: int
    bytes_down: int
    device_seconds: Mapping[str, float]
    loss_first: float | None
    loss_last: float | None
    trained_experts: int | None
    never_trained: int | None
    coverage_cv: float | None
    missed_mass: float | None
    routing_consistency: float | None
    parameters_up: int | None

    @property
    def seconds(self) -> float:
        """Simulated time of the round: its slowest device."""
        return max(self.device_seconds.values(), default=0.0)


@dataclass(frozen=True, kw_only=True)
class Score:
    """One measurement; round 0 is before training. `per_row` is right or wrong per row, bool [rows]."""

    round: int
    scope: str
    split: str
    client: str | None
    task: str
    metric: str
    value: float
    rows: int
    per_row: NDArray[np.bool_] | None


@dataclass(frozen=True, kw_only=True)
class Run:
    """One file. `seconds` is None while the run has no "end" line.

    `profile_bytes` are streamed once, before the first round; `last_bytes_down` are those of the last leases, which
    only measure.
    """

    suite: str
    method: str
    seed: int
    settings: Mapping[str, Any]
    clients: Mapping[str, Client]
    rounds: tuple[Round, ...]
    scores: tuple[Score, ...]
    seconds: float | None
    profile_bytes: int
    last_bytes_down: int

    @property
    def finished(self) -> bool:
        """Whether its "end" line was written."""
        return self.seconds is not None

    @cached_property
    def by_measure(self) -> Mapping[tuple[str, str, str, str], tuple[Score, ...]]:
        """The scores by (scope, task, metric, split)."""
        found: dict[tuple[str, str, str, str], list[Score]] = {}
        for score in self.scores:
            key = (score.scope, score.task, score.metric, score.split)
            found.setdefault(key, []).append(score)
        return {key: tuple(scores) for key, scores in found.items()}


class _Line:
    """One JSON object with the place it stands at; every read is checked."""

    def __init__(self, values: Any, where: str) -> None:
        self.where = where
        if not isinstance(values, dict):
            raise RunsError(f"{where}: found {type(values).__name__}, wanted a JSON object")
        self.values: dict[str, Any] = values

    def fail(self, key: str, wanted: str) -> RunsError:
        found = repr(self.values[key]) if key in self.values else "nothing"
        if len(found) > 60:
            found = found[:57] + "..."
        return RunsError(f"{self.where}: {key!r} is {found}, wanted {wanted}")

    def text(self, key: str, choices: tuple[str, ...] = ()) -> str:
        value = self.values.get(key)
        if not isinstance(value, str) or not value or (choices and value not in choices):
            raise self.fail(key, f"one of {', '.join(choices)}" if choices else "a name")
        return value

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            raise self.fail(key, "a list of names")
        return tuple(value)

    def count(self, key: str) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(key, "a whole number of 0 or more")
        return value

    def count_or_none(self, key: str) -> int | None:
        return None if self.values.get(key) is None else self.count(key)

    def number(self, key: str) -> float:
        """A number; not a number and the infinities, which a diverged run writes, become NaN."""
        value = self.values.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(key, "a number")
        return float(value) if math.isfinite(value) else math.nan

    def number_or_none(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key)

    def table(self, key: str) -> dict[str, Any]:
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.fail(key, "an object")
        return value


def _clients(line: _Line) -> dict[str, Client]:
    clients = {}
    for name, values in line.table("clients").items():
        entry = _Line(values, f"{line.where}: client {name}")
        clients[name] = Client(
            tasks=entry.texts("tasks"),
            rows=entry.count("rows"),
            budget=entry.number("budget"),
            experts=entry.count("experts"),
            predicted_bytes=entry.count("predicted_bytes"),
            budget_bytes=entry.count("budget_bytes"),
        )
    return clients


def _round(line: _Line) -> Round:
    seconds = _Line(line.table("device_seconds"), line.where)
    return Round(
        round=line.count("round"),
        clients=line.texts("clients"),
        failed=line.texts("failed"),
        bytes_up=line.count("bytes_up"),
        bytes_down=line.count("bytes_down"),
        device_seconds={name: seconds.number(name) for name in seconds.values},
        loss_first=line.number_or_none("loss_first"),
        loss_last=line.number_or_none("loss_last"),
        trained_experts=line.count_or_none("trained_experts"),
        never_trained=line.count_or_none("never_trained"),
        coverage_cv=line.number_or_none("coverage_cv"),
        missed_mass=line.number_or_none("missed_mass"),
        routing_consistency=line.number_or_none("routing_consistency"),
        parameters_up=line.count_or_none("parameters_up"),
    )


def _per_row(line: _Line, rows: int) -> NDArray[np.bool_] | None:
    if line.values.get("per_row") is None:
        return None
    try:
        packed = np.frombuffer(bytes.fromhex(line.text("per_row")), dtype=np.uint8)
    except ValueError as error:
        if isinstance(error, RunsError):
            raise
        raise line.fail("per_row", "hexadecimal digits") from None
    if len(packed) != -(-rows // 8):
        raise line.fail("per_row", f"{-(-rows // 8)} bytes for {rows} rows")
    return np.unpackbits(packed, count=rows).astype(bool)


def _score(line: _Line) -> Score:
    scope = line.text("scope", tuple(SPLITS))
    metric = line.text("metric", METRICS)
    value = line.number("value")
    if metric in PRIMARY and (value < 0 or value > 1):
        raise line.fail("value", f"a fraction between 0 and 1 for {metric}")
    rows = line.count("rows")
    return Score(
        round=line.count("round"),
        scope=scope,
        split=line.text("split", SPLITS[scope]),
        client=line.text("client") if scope == "device" else None,
        task=line.text("task"),
        metric=metric,
        value=value,
        rows=rows,
        per_row=_per_row(line, rows) if metric == "accuracy" else None,
    )


def read_run(path: Path) -> Run:
    """Read one run's file.

    Raises
    ------
    RunsError
        "<path>:<line>: what was found, what was wanted".
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise RunsError(f"{path}: cannot be read: {error}") from None
    head: _Line | None = None
    rounds: list[Round] = []
    scores: list[Score] = []
    seconds: float | None = None
    profile_bytes = last_bytes_down = 0
    for number, text in enumerate(lines, start=1):
        where = f"{path}:{number}"
        try:
            line = _Line(json.loads(text), where)
        except ValueError as error:
            if isinstance(error, RunsError):
                raise
            if number == len(lines) and not text.endswith("\n") and seconds is None:
                break  # a process killed while it wrote; the run has no end and is not counted
            raise RunsError(f"{where}: not JSON ({error})") from None
        kind = line.text("kind", ("run", "round", "score", "end"))
        if (kind == "run") != (head is None):
            found = "a second line" if head else f"{kind!r}"
            raise RunsError(f'{where}: found {found}, wanted one line of kind "run", the first')
        if seconds is not None:
            raise RunsError(f'{where}: found a line after the "end" line')
        if kind == "run":
            head = line
            _check_place(path, line)
            clients = _clients(line)
            settings = line.table("settings")
            profile_bytes = line.count("profile_bytes")
        elif kind == "round":
            rounds.append(_round(line))
        elif kind == "score":
            scores.append(_score(line))
        else:
            seconds = line.number("seconds")
            last_bytes_down = line.count("bytes_down")
    if head is None:
        return _empty(path)
    return Run(
        suite=head.text("suite"),
        method=head.text("method"),
        seed=head.count("seed"),
        settings=settings,
        clients=clients,
        rounds=tuple(rounds),
        scores=tuple(scores),
        seconds=seconds,
        profile_bytes=profile_bytes,
        last_bytes_down=last_bytes_down,
    )


def _seed(path: Path) -> int:
    if not path.stem.isdecimal():
        raise RunsError(f"{path}: found the name {path.name!r}, wanted <seed>.jsonl")
    return int(path.stem)


def _check_place(path: Path, line: _Line) -> None:
    found = (line.text("suite"), line.text("method"), line.count("seed"))
    place = (path.parent.parent.name, path.parent.name, _seed(path))
    if found != place:
        raise RunsError(f"{line.where}: the line says {found}, its place says {place}")


def _empty(path: Path) -> Run:
    """A run that was started and has written nothing yet."""
    return Run(
        suite=path.parent.parent.name,
        method=path.parent.name,
        seed=_seed(path),
        settings={},
        clients={},
        rounds=(),
        scores=(),
        seconds=None,
        profile_bytes=0,
        last_bytes_down=0,
    )


def read_runs(folder: Path) -> list[Run]:
    """Every run under `folder`, in the order of suite, method and seed.

    Raises
    ------
    RunsError
        A malformed line, or a folder without any run.
    """
    # A sweep keeps its cut base and its caches in folders with a dot.
    runs = [read_run(path) for path in folder.glob("[!.]*/[!.]*/*.jsonl")]
    if not runs:
        raise RunsError(f"{folder}: found no run, wanted <suite>/<method>/<seed>.jsonl files")
    return sorted(runs, key=lambda run: (run.suite, run.method, run.seed))
