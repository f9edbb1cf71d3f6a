"""From raw runs to the numbers of the page: last values, curves, paired differences, costs. Nothing is drawn here.

The global model (test split) and the devices (their own held-back rows) are two scopes and never meet in one number.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from benchmarks.federated.compare import (
    Interval,
    first_reaching,
    hierarchical_bootstrap,
    relative_reduction,
    t_interval,
)
from benchmarks.federated.read_runs import METRICS, PRIMARY, Run

SCOPES = ("global", "device")
FORGETTING = ("heldout", "lm_loss")
SELECTION = re.compile(r"selection-(\d+)")
NO_RIVALS = frozenset({"oracle"})
"""Methods that no user could run; never a baseline."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """One run's value of one measure: percent, or nats for a loss, with what it is the mean of.

    `rows` are 0 or 100 per row, float [rows]; `clients` are the devices' own values. Both None where only the value is
    known.
    """

    value: float
    rows: NDArray[np.float64] | None = None
    clients: Mapping[str, float] | None = None


def scale(metric: str) -> float:
    """100 where the raw value is a fraction."""
    return 100.0 if metric in PRIMARY else 1.0


def lower_is_better(metric: str) -> bool:
    """Whether it is a loss."""
    return metric not in PRIMARY


def kind(suite: str) -> str:
    """What a suite's name says it is: "selection", "lora", "uplink", "ablation" or "main".

    Examples
    --------
    >>> kind("selection-25"), kind("ablation-lora"), kind("agnews-0.1")
    ('selection', 'lora', 'main')
    """
    if SELECTION.fullmatch(suite):
        return "selection"
    for word in ("lora", "uplink"):
        if word in re.split(r"[-_]", suite):
            return word
    return "ablation" if suite.startswith("ablation-") else "main"


def values_at(run: Run, scope: str, task: str, metric: str, split: str) -> dict[int, Value]:
    """The measure by round. Devices: each client counts once, whatever rows it has."""
    found: dict[int, Value] = {}
    clients: dict[int, dict[str, float]] = {}
    factor = scale(metric)
    for s in run.by_measure.get((scope, task, metric, split), ()):
        if s.client is not None:
            clients.setdefault(s.round, {})[s.client] = factor * s.value
        else:
            rows = None if s.per_row is None else factor * s.per_row.astype(np.float64)
            found[s.round] = Value(value=factor * s.value, rows=rows)
    for number, values in clients.items():
        found[number] = Value(value=float(np.mean(list(values.values()))), clients=values)
    return dict(sorted(found.items()))


class Results:
    """The finished runs of one suite, by method and seed."""

    def __init__(self, suite: str, runs: Sequence[Run], *, ours: str, reference: str) -> None:
        self.suite = suite
        self.ours = ours
        self.reference = reference
        self.runs: dict[str, dict[int, Run]] = {}
        for run in runs:
            if run.suite == suite and run.finished:
                self.runs.setdefault(run.method, {})[run.seed] = run
        self._values: dict[tuple[str, int, str, str, str, str], dict[int, Value]] = {}

    @cached_property
    def measures(self) -> tuple[tuple[str, str], ...]:
        """(task, metric) pairs that were scored, without the forgetting measure."""
        found = {
            (s.task, s.metric)
            for seeds in self.runs.values()
            for run in seeds.values()
            for s in run.scores
        } - {FORGETTING}
        return tuple(sorted(found, key=lambda pair: (pair[0], METRICS.index(pair[1]))))

    @cached_property
    def primary(self) -> tuple[tuple[str, str], ...]:
        """The measures in the mean of tasks: accuracy, F1 or ROUGE-2."""
        return tuple(pair for pair in self.measures if pair[1] in PRIMARY)

    @cached_property
    def losses(self) -> tuple[tuple[str, str], ...]:
        """The measures in the mean of relative answer-loss reductions."""
        return tuple(pair for pair in self.measures if pair[1] == "answer_loss")

    @property
    def seeds(self) -> tuple[int, ...]:
        """Every seed that some method finished."""
        return tuple(sorted({seed for seeds in self.runs.values() for seed in seeds}))

    def rivals(self) -> tuple[str, ...]:
        """Baselines: every method but ours, our variants ("ours-...") and the oracle."""
        return tuple(
            m
            for m in self.runs
            if m != self.ours and not m.startswith(f"{self.ours}-") and m not in NO_RIVALS
        )

    def for_reference(self, method: str) -> bool:
        """Whether a method needs far more memory than the devices have, on purpose."""
        runs = self.runs[method].values()
        return any(run.settings.get("method", {}).get("over_budget", False) for run in runs)

    def values(
        self, method: str, seed: int, scope: str, task: str, metric: str, split: str = ""
    ) -> dict[int, Value]:
        """One run's values by round, of the test split or the held-back rows unless `split` says otherwise."""
        split = split or ("test" if scope == "global" else "held_back")
        key = (method, seed, scope, task, metric, split)
        if key not in self._values:
            run = self.runs[method][seed]
            self._values[key] = values_at(run, scope, task, metric, split)
        return self._values[key]

    def last(self, method: str, seed: int, scope: str, task: str, metric: str) -> Value | None:
        """The last value after training; None if there is none."""
        found = {r: v for r, v in self.values(method, seed, scope, task, metric).items() if r > 0}
        return found[max(found)] if found else None

    def finals(self, method: str, scope: str, task: str, metric: str) -> dict[int, float]:
        """Last value by seed; empty unless every finished seed has one."""
        found = {seed: self.last(method, seed, scope, task, metric) for seed in self.runs[method]}
        if any(v is None for v in found.values()):
            return {}
        return {seed: v.value for seed, v in found.items() if v is not None}

    def interval(self, method: str, scope: str, task: str, metric: str) -> Interval | None:
        """Mean over seeds of the last value."""
        found = self.finals(method, scope, task, metric)
        return t_interval(list(found.values())) if found else None

    def task_means(self, method: str, scope: str) -> dict[int, float]:
        """Mean of the tasks' primary measures by seed, in percent; empty if a task is missing."""
        each = [self.finals(method, scope, *pair) for pair in self.primary]
        if not each or not all(each):
            return {}
        return {seed: float(np.mean([found[seed] for found in each])) for seed in each[0]}

    def loss_reductions(self, method: str, scope: str) -> dict[int, float]:
        """Mean over tasks of the share of the answer loss that training took away, in percent, by seed."""
        means: dict[int, float] = {}
        for seed in self.runs[method]:
            shares = []
            for pair in self.losses:
                before = self.values(method, seed, scope, *pair).get(0)
                after = self.last(method, seed, scope, *pair)
                if before is None or after is None:
                    return {}
                shares.append(100 * relative_reduction(before.value, after.value))
            if shares:
                means[seed] = float(np.mean(shares))
        return means

    def ranking(self, scope: str) -> list[tuple[str, Interval]]:
        """Methods by their mean of tasks, the best first; methods without one are left out."""
        found = [(m, self.task_means(m, scope)) for m in self.runs]
        ranked = [(m, t_interval(list(v.values()))) for m, v in found if v]
        # A diverged run (NaN) comes last.
        return sorted(ranked, key=lambda e: (math.isnan(e[1].mean), -e[1].mean, e[0]))

    def best(
        self, scope: str, task: str, metric: str, among: Sequence[str]
    ) -> tuple[str, Interval] | None:
        """The method of `among` with the best mean over its seeds."""
        found = [(m, self.interval(m, scope, task, metric)) for m in among]
        usable = [(m, i) for m, i in found if i is not None and not math.isnan(i.mean)]
        sign = 1 if lower_is_better(metric) else -1
        return min(usable, key=lambda e: (sign * e[1].mean, e[0]), default=None)

    def difference(
        self, method: str, other: str, scope: str, pairs: Sequence[tuple[str, str]]
    ) -> tuple[Interval, Interval] | None:
        """`method` - `other` on the seeds both have: (hierarchical bootstrap, paired t over seeds).

        Several `pairs` are averaged, as in the mean of tasks. None where they share no seed or a value is missing.
        """
        strata: list[list[NDArray[np.float64]]] = []
        per_seed = []
        for seed in sorted(self.runs[method].keys() & self.runs[other].keys()):
            parts, means = [], []
            for pair in pairs:
                a, b = (self.last(m, seed, scope, *pair) for m in (method, other))
                if a is None or b is None:
                    return None
                parts.append(_paired(a, b))
                # Per seed the reported scores, so that the table's differences are those of its values.
                means.append(a.value - b.value)
            strata.append(parts)
            per_seed.append(float(np.mean(means)))
        if not strata or not pairs:
            return None
        # The same comparison draws the same resamples whatever else is on the page.
        name = repr((self.suite, method, other, scope, tuple(pairs)))
        rng = np.random.default_rng(zlib.crc32(name.encode()))
        return hierarchical_bootstrap(strata, rng), t_interval(per_seed)

    def curve_split(self, scope: str, task: str, metric: str) -> str:
        """The split that was scored in the most rounds; the test split when equal."""
        if scope == "device":
            return "held_back"
        seeds = [(m, seed) for m, found in self.runs.items() for seed in found]
        count = {
            split: sum(len(self.values(m, s, scope, task, metric, split)) for m, s in seeds)
            for split in ("test", "validation")
        }
        return max(count, key=lambda split: count[split])

    def curve(
        self, method: str, seed: int, scope: str, task: str, metric: str
    ) -> tuple[list[int], list[float]]:
        """Rounds and values of one run, on the split of `curve_split`."""
        split = self.curve_split(scope, task, metric)
        found = self.values(method, seed, scope, task, metric, split)
        return list(found), [v.value for v in found.values()]

    def mean_curve(
        self, method: str, scope: str, task: str, metric: str
    ) -> tuple[list[int], list[float]]:
        """Mean over seeds in the rounds that every seed has."""
        curves = [
            dict(zip(*self.curve(method, s, scope, task, metric), strict=True))
            for s in self.runs[method]
        ]
        shared = sorted(set.intersection(*(set(c) for c in curves))) if curves else []
        return shared, [float(np.mean([c[r] for c in curves])) for r in shared]

    def target(self, scope: str, task: str, metric: str) -> float:
        """The best last value (mean over seeds) of any baseline, on the curve's split; NaN without one."""
        finals = []
        for method in self.rivals():
            rounds, values = self.mean_curve(method, scope, task, metric)
            if rounds and rounds[-1] > 0 and not math.isnan(values[-1]):
                finals.append(values[-1])
        best = min if lower_is_better(metric) else max
        return best(finals) if finals else math.nan

    def reaching(
        self, method: str, scope: str, task: str, metric: str, share: float
    ) -> list[tuple[int, float] | None]:
        """By seed: the first scored round at `share` of the target and the simulated seconds up to it, or None."""
        level = share * self.target(scope, task, metric)
        found: list[tuple[int, float] | None] = []
        for seed, run in self.runs[method].items():
            rounds, values = self.curve(method, seed, scope, task, metric)
            first = first_reaching(rounds, values, level, lower_is_better(metric))
            seconds = sum(r.seconds for r in run.rounds if first is not None and r.round <= first)
            found.append(None if first is None else (first, seconds))
        return found

    def over_seeds(self, method: str, what: Callable[[Run], float | None]) -> Interval | None:
        """Mean over seeds of a fact of a run; None unless every seed has it."""
        found = [what(run) for run in self.runs[method].values()]
        numbers = [v for v in found if v is not None]
        return t_interval(numbers) if numbers and len(numbers) == len(found) else None

    def within_budget(self, method: str) -> float:
        """Share of the clients, over all seeds, whose predicted peak is within their budget; NaN without any."""
        clients = [c for run in self.runs[method].values() for c in run.clients.values()]
        if not clients:
            return math.nan
        return sum(c.predicted_bytes <= c.budget_bytes for c in clients) / len(clients)


def _paired(a: Value, b: Value) -> NDArray[np.float64]:
    """Differences by row or client where both have the same; of the two values otherwise."""
    if a.rows is not None and b.rows is not None and len(a.rows) == len(b.rows):
        return a.rows - b.rows
    if a.clients is not None and b.clients is not None:
        theirs = b.clients
        shared = [value - theirs[name] for name, value in a.clients.items() if name in theirs]
        if shared:
            return np.array(shared)
    return np.array([a.value - b.value])
