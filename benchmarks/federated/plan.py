"""Which runs a sweep consists of, and how hyper-parameters are tuned: the same grid and effort for every method."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.federated import suites
from benchmarks.federated.methods import METHODS, Method, methods_of
from benchmarks.federated.suites import Suite

RATES = (0.001, 0.003, 0.01, 0.03)
TUNING_SEED, TUNING_ROUNDS = 100, 8
"""The worlds that hyper-parameters are tuned in, none of the reported ones, and how long: half a run."""


class PlanError(ValueError):
    """A file of tuned values that cannot be used; one line."""


@dataclass(frozen=True)
class Task:
    """One run."""

    suite: Suite
    method: Method
    seed: int
    tuning: bool = False

    @property
    def name(self) -> str:
        """What it is called in logs and on disk."""
        if self.tuning:
            return f"tuning/{self.suite.name}/{self.method.name}/{self.method.learning_rate:g}"
        return f"{self.suite.name}/{self.method.name}/{self.seed}"

    def path(self, out: Path) -> Path:
        """Its file."""
        return out / f"{self.name}.jsonl"


def kind(suite: Suite) -> str:
    """Suites of the same tasks share what was tuned."""
    return "+".join(suite.tasks)


def read_tuned(path: Path | None) -> dict[str, dict[str, float]]:
    """Tasks of a suite -> method -> learning rate; raises PlanError."""
    if path is None:
        return {}
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
        rates = {
            str(tasks): {str(name): float(x["learning_rate"]) for name, x in methods.items()}
            for tasks, methods in found.items()
        }
    except FileNotFoundError as error:
        raise PlanError(f"--tuned {path}: no such file; make it with --tune") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise PlanError(f"--tuned {path}: not a file of tuned values: {error}") from error
    return rates


def tasks(
    names: Sequence[str],
    chosen: Sequence[str] | None,
    seeds: Sequence[int],
    tuned: Path | None,
) -> list[Task]:
    """All runs of the suites; seed by seed, so that an early stop leaves whole comparisons."""
    rates = read_tuned(tuned)
    made = []
    for seed in seeds:
        for name in names:
            for method in methods_of(name):
                if chosen and method.name not in chosen:
                    continue
                known = rates.get(kind(suites.SUITES[name]), {})
                rate = known.get(method.tuned_as or method.name, method.learning_rate)
                made.append(Task(suites.SUITES[name], replace(method, learning_rate=rate), seed))
    return made


def grid(names: Sequence[str], chosen: Sequence[str] | None) -> list[Task]:
    """Every method at every learning rate, one world per suite."""
    return [
        Task(
            replace(suites.SUITES[name], rounds=TUNING_ROUNDS),
            replace(method, learning_rate=rate),
            TUNING_SEED,
            tuning=True,
        )
        for name in names
        for method in METHODS.values()
        if not chosen or method.name in chosen
        for rate in RATES
    ]


def choose(out: Path, tasks: Sequence[Task], into: Path) -> Path:
    """Write each method's rate of the highest validation score, with all that was measured."""
    measured: dict[str, dict[str, dict[float, float]]] = {}
    for task in tasks:
        by_method = measured.setdefault(kind(task.suite), {})
        by_method.setdefault(task.method.name, {})[task.method.learning_rate] = validation(
            task.path(out)
        )
    found = {
        tasks_of: {
            name: {
                "learning_rate": max(rates, key=lambda rate: rates[rate]),
                "grid": {f"{rate:g}": round(score, 4) for rate, score in rates.items()},
            }
            for name, rates in by_method.items()
        }
        for tasks_of, by_method in measured.items()
    }
    into.parent.mkdir(parents=True, exist_ok=True)
    into.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return into


def validation(path: Path) -> float:
    """A tuning run's score at its last round, the mean of the global model's and the devices' on validation rows.

    Accuracy where every task has it; else minus the answer loss, because answers are not written while tuning.
    """
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    with open(path, encoding="utf-8") as lines:
        for text in lines:
            line = json.loads(text)
            if line["kind"] == "score":
                by_task = found.setdefault((line["metric"], line["scope"]), {})
                by_task.setdefault(line["task"], []).append(float(line["value"]))
    every = set(found["answer_loss", "global"])
    accurate = set(found.get(("accuracy", "global"), ())) == every
    metric, sign = ("accuracy", 1.0) if accurate else ("answer_loss", -1.0)
    means = [
        sum(sum(v) / len(v) for v in found[metric, scope].values()) / len(found[metric, scope])
        for scope in ("global", "device")
    ]
    return sign * sum(means) / 2
