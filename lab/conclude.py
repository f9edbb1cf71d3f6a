"""After the fleet has gone: what it did as one value, the ceiling to compare it with, the proof of its adapter."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from lab import fleet, history, outcome
from lab.dataset import Split
from lab.fleet import Plan
from lab.history import HistoryError
from lab.processes import Processes
from lab.scenario import Scenario
from protocol import manifest
from protocol.manifest import Manifest


class ConclusionError(RuntimeError):
    """An adapter that does not pass, or a base that cannot be trained centrally. One line."""


def manifests(plan: Plan, chosen: Scenario) -> dict[str, Manifest]:
    """Profile -> what its devices downloaded; raises ManifestError."""
    return {
        profile: manifest.read_manifest(plan.store / profile / "manifest.json")
        for profile in chosen.profiles
    }


def train_centrally(processes: Processes, plan: Plan, chosen: Scenario, console: Console) -> float:
    """Accuracy of the ceiling; raises ProcessError, ConclusionError."""
    base = manifest.read_base(plan.store / "base.json")
    if base.peft is None:
        raise ConclusionError("--ceiling: PEFT cannot train the adapter experts of this base")
    built = manifests(plan, chosen)
    rank = max(slot.rank for m in built.values() for layer in m.shape.slots for slot in layer)
    samples = history.samples(_history(plan), _batches(built))
    with console.status(f"training the whole base centrally with {samples} samples ..."):
        child = processes.run(
            "central",
            [
                *("lab.central", *fleet.judge_flags(plan, chosen)),
                *("--train", str(plan.folder / "data"), "--samples", str(samples)),
                *("--rank", str(rank), "--threads", str(os.cpu_count() or 1)),
                *("--learning-rate", str(chosen.server.learning_rate)),
                *("--router-learning-rate", str(chosen.server.router_learning_rate)),
                *("--target-parameters", *base.peft.target_parameters),
                *("--target-modules", *base.peft.target_modules),
                *("--modules-to-save", *base.peft.modules_to_save),
                *("--seed", str(chosen.seed)),
            ],
            # Threads that wait by spinning take the cores from others.
            environment={"OMP_WAIT_POLICY": "PASSIVE"},
        )
    return float(json.loads(child.last_words())["accuracy"])


def _batches(built: Mapping[str, Manifest]) -> dict[str, int]:
    return {profile: m.shape.batch for profile, m in built.items()}


def _history(plan: Plan) -> list[dict[str, Any]]:
    path = plan.state / "history.jsonl"
    try:
        return history.parse(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise HistoryError(f"{path}: {error.strerror}") from error


def put_together(
    plan: Plan,
    chosen: Scenario,
    data: str,
    split: Split,
    gone: frozenset[str],
    scores: Mapping[int, float],
    seconds: float,
    building: float,
) -> outcome.Outcome:
    """History, scores and predictions as one value; raises HistoryError, ManifestError."""
    base, built = manifest.read_base(plan.store / "base.json"), manifests(plan, chosen)
    return outcome.gather(
        name=chosen.name,
        data=data,
        test_rows=len(split.test),
        labels=len(split.labels),
        batch=_batches(built),
        layers=base.moe_layers,
        experts=base.num_experts,
        history=_history(plan),
        gone=gone,
        scores=scores,
        predicted={profile: m.memory.predicted for profile, m in built.items()},
        slots={
            profile: dict(
                collections.Counter(
                    f"{slot.format}/{slot.rank}" for layer in m.shape.slots for slot in layer
                )
            )
            for profile, m in built.items()
        },
        seconds=seconds,
        seconds_building=building,
    )


def verify(plan: Plan, console: Console) -> None:
    """`python -m export.verify_adapter` on the last adapter; raises ConclusionError when it does not pass."""
    versions = [int(p.name) for p in (plan.state / "adapters").iterdir() if p.name.isdecimal()]
    adapter = plan.state / "adapters" / str(max(versions))
    done = subprocess.run(
        [sys.executable, "-m", "export.verify_adapter", str(plan.base), str(adapter)],
        capture_output=True,
        text=True,
        check=False,
    )
    words = done.stdout.strip() if done.returncode == 0 else done.stderr.strip()
    line = words.splitlines()[-1] if words else f"exit status {done.returncode}"
    if done.returncode != 0:
        raise ConclusionError(f"export.verify_adapter refused {adapter}: {line}")
    console.print(f"adapter: {adapter}\nexport.verify_adapter: {line}", highlight=False)
