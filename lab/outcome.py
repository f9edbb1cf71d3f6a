"""What a run came to: the server's history and the lab's own scores, put together. Pure.

Letters: L MoE layers, E experts per layer, V adapter versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lab.history import HistoryError, accuracies, rounds_of, samples


@dataclass(frozen=True, kw_only=True)
class DeviceOutcome:
    """One device over the whole run. Accuracy is None where there is none."""

    name: str
    profile: str
    backend: str
    rows: int
    held_back_rows: int
    experts: tuple[int, ...]  # resident per MoE layer, in its last training round
    trained: tuple[int, ...]  # of these, the ones in slots that train
    slots: dict[str, int]  # "format/rank" -> slots over all layers, rank 0 for a frozen one
    budget_bytes: int
    predicted_bytes: int  # by export, -1 where unknown
    peak_bytes: int  # the highest of the rounds it reported
    gone: bool  # its process ended before the run did
    baseline_bytes: int
    bytes_down: int
    bytes_up: int
    updates: int  # accepted, training rounds only
    accuracy: tuple[
        float | None, ...
    ]  # [V] with the global adapter of each version, own held-back rows
    missed_mass: (
        float  # mean over layers in the last round: router mass on experts it does not hold
    )

    @property
    def before(self) -> float | None:
        """Accuracy with the untrained adapter."""
        return next((a for a in self.accuracy[:1]), None)

    @property
    def after(self) -> float | None:
        """Accuracy with the last adapter it measured."""
        return next((a for a in reversed(self.accuracy[1:]) if a is not None), None)

    @property
    def fits(self) -> bool:
        """Did it work to the end, and was the measured peak within the budget?"""
        return not self.gone and self.peak_bytes <= self.budget_bytes


@dataclass(frozen=True, kw_only=True)
class RoundOutcome:
    """One closed round."""

    round: int
    work: str
    version: int
    seconds: float
    closed_by: str
    missing: tuple[str, ...]
    rejected: tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A whole run."""

    name: str
    data: str
    test_rows: int
    labels: int
    samples: int  # rows trained on over all devices and rounds, with repeats
    layers: tuple[int, ...]
    experts: int  # E
    devices: tuple[DeviceOutcome, ...]
    rounds: tuple[RoundOutcome, ...]
    global_accuracy: tuple[float | None, ...]  # [V]; version 0 is the base
    ceiling: float | None
    trained_rounds: dict[str, NDArray[np.int64]]  # device -> [L, E], rounds in which it trained it
    resident_rounds: dict[str, NDArray[np.int64]]  # the same, in which it held it
    seconds: float
    seconds_building: float

    @property
    def base_accuracy(self) -> float | None:
        """Global accuracy of the base."""
        return self.global_accuracy[0] if self.global_accuracy else None

    @property
    def final_accuracy(self) -> float | None:
        """Global accuracy of the last adapter that was scored."""
        return next((a for a in reversed(self.global_accuracy[1:]) if a is not None), None)

    def mean_device_accuracy(self) -> list[float | None]:
        """[V] mean over the devices that measured a version."""
        means: list[float | None] = []
        for version in range(len(self.global_accuracy)):
            known = [
                a
                for d in self.devices
                if version < len(d.accuracy) and (a := d.accuracy[version]) is not None
            ]
            means.append(float(np.mean(known)) if known else None)
        return means


def kind_order(kind: str) -> tuple[int, str]:
    """Sorts kinds of slots ("format/rank") as the slots of a layer are: higher rank first, then the wider format.

    >>> sorted(["int4/0", "int4/8", "int8/8"], key=kind_order)
    ['int8/8', 'int4/8', 'int4/0']
    """
    format, rank = kind.split("/")
    return -int(rank), "" if format == "int8" else format


def _device(
    name: str,
    history: Sequence[dict[str, Any]],
    layers: Sequence[int],
    versions: int,
    predicted: Mapping[str, int],
    slots: Mapping[str, dict[str, int]],
    gone: bool,
) -> DeviceOutcome:
    mine = [(e, e["devices"][name]) for e in history if name in e["devices"]]
    facts = [f for _, f in mine]
    training = [f for e, f in mine if e["work"] == "train"]
    last = (training or facts)[-1]
    found = accuracies(history, name)
    return DeviceOutcome(
        name=name,
        profile=last["profile"],
        backend=last["backend"],
        rows=max(f["rows"] for f in facts),
        held_back_rows=max(f["held_back_rows"] for f in facts),
        experts=tuple(len(last["resident"].get(str(layer), ())) for layer in layers),
        trained=tuple(len(last["trained"].get(str(layer), ())) for layer in layers),
        slots=slots.get(last["profile"], {}),
        budget_bytes=last["budget_bytes"],
        predicted_bytes=predicted.get(last["profile"], -1),
        gone=gone,
        peak_bytes=max(f["peak_bytes"] for f in facts),
        baseline_bytes=max(f["baseline_bytes"] for f in facts),
        bytes_down=sum(f["bytes_down"] for f in facts),
        bytes_up=sum(f["bytes_up"] for f in facts),
        updates=len(training),
        accuracy=tuple(found.get(version) for version in range(versions)),
        missed_mass=float(np.mean(last["missed_mass"])),
    )


def gather(
    *,
    name: str,
    data: str,
    test_rows: int,
    labels: int,
    batch: Mapping[str, int],
    layers: Sequence[int],
    experts: int,
    history: Sequence[dict[str, Any]],
    scores: Mapping[int, float],
    predicted: Mapping[str, int],
    slots: Mapping[str, dict[str, int]],
    gone: frozenset[str] = frozenset(),
    ceiling: float | None = None,
    seconds: float = 0.0,
    seconds_building: float = 0.0,
) -> Outcome:
    """Put a run together; devices with the largest budget first.

    Parameters
    ----------
    batch : profile -> rows per step
    history : parsed lines of history.jsonl
    scores : adapter version -> global accuracy; 0 is the base
    predicted : profile -> bytes that export predicted
    slots : profile -> "format/rank" -> slots over all layers
    gone : devices whose process ended before the run did

    Raises
    ------
    HistoryError
        When no device delivered anything, or a line lacks a key.
    """
    try:
        names = sorted({device for entry in history for device in entry["devices"]})
        if not names:
            raise HistoryError("the history names no device that delivered an update")
        versions = 1 + max(entry["version"] for entry in history)
        devices = [
            _device(n, history, layers, versions, predicted, slots, n in gone) for n in names
        ]
        devices.sort(key=lambda d: (-d.budget_bytes, d.name))
        return Outcome(
            name=name,
            data=data,
            test_rows=test_rows,
            labels=labels,
            samples=samples(history, batch),
            layers=tuple(layers),
            experts=experts,
            devices=tuple(devices),
            rounds=tuple(
                RoundOutcome(
                    round=entry["round"],
                    work=entry["work"],
                    version=entry["version"],
                    seconds=entry["seconds"],
                    closed_by=entry["closed_by"],
                    missing=tuple(entry["missing"]),
                    rejected=tuple((r["device"], r["reason"]) for r in entry["rejected"]),
                )
                for entry in history
            ),
            global_accuracy=tuple(scores.get(version) for version in range(versions)),
            ceiling=ceiling,
            trained_rounds={n: rounds_of("trained", history, n, layers, experts) for n in names},
            resident_rounds={n: rounds_of("resident", history, n, layers, experts) for n in names},
            seconds=seconds,
            seconds_building=seconds_building,
        )
    except KeyError as error:
        raise HistoryError(f"the history has no {error}") from error
