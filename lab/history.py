"""The server's history.jsonl: one closed round per line, and what can be counted in it. Pure.

Letters: L MoE layers, E experts per layer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HistoryError(ValueError):
    """A history that cannot be read. One line."""


def parse(text: str, where: str) -> list[dict[str, Any]]:
    """One dict per closed round; raises HistoryError. A last line cut short by a crash is left out."""
    lines = text.splitlines()
    rounds = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise HistoryError(f"{where}:{number}: not JSON") from error
        if not isinstance(entry, dict) or not {"round", "work", "devices"} <= set(entry):
            raise HistoryError(f"{where}:{number}: no line of a history")
        rounds.append(entry)
    return rounds


def _measured(value: float) -> float | None:
    return None if value < 0 else value


def accuracies(history: Sequence[dict[str, Any]], name: str) -> dict[int, float]:
    """Adapter version -> accuracy of the device with it, before it trained further."""
    found: dict[int, float] = {}
    start = 0  # every round works from the version that the one before it made
    for entry in history:
        facts = entry["devices"].get(name)
        if facts is not None:
            value = _measured(facts["accuracy_before"])
            if value is not None:
                found.setdefault(start, value)
        start = entry["version"]
    return found


def rounds_of(
    what: str, history: Iterable[dict[str, Any]], name: str, layers: Sequence[int], experts: int
) -> NDArray[np.int64]:
    """In how many training rounds each expert was among a device's `what` (resident, trained) experts, [L, E]."""
    counts = np.zeros((len(layers), experts), dtype=np.int64)
    for entry in history:
        if entry["work"] == "train" and name in entry["devices"]:
            for layer, ids in entry["devices"][name][what].items():
                counts[list(layers).index(int(layer)), list(ids)] += 1
    return counts


def samples(history: Sequence[dict[str, Any]], batch: Mapping[str, int]) -> int:
    """Rows trained on over all devices and rounds, with repeats; `batch` is profile -> rows per step."""
    return sum(
        facts["steps"] * batch[facts["profile"]]
        for entry in history
        if entry["work"] == "train"
        for facts in entry["devices"].values()
    )
