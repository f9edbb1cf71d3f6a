"""The scoreboard's numbers as CSV: every round of every run, and every last value."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

from benchmarks.federated.read_runs import SPLITS, Run
from benchmarks.federated.results import SCOPES, values_at

_ROUND = (
    "bytes_up",
    "bytes_down",
    "loss_first",
    "loss_last",
    "trained_experts",
    "never_trained",
    "coverage_cv",
    "missed_mass",
    "routing_consistency",
)


def _text(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue()


def _keys(runs: Sequence[Run]) -> list[tuple[str, str, str, str]]:
    found = {key for run in runs for key in run.by_measure}
    return sorted(found, key=lambda k: (SCOPES.index(k[0]), k[1:]))


def per_round(runs: Sequence[Run]) -> str:
    """A line per round of every run: traffic, memory, simulated time, coverage and scores (F43 of FedMoE's report).

    Scores are percent or nats, a column per scope, split, task and metric; devices are averaged. Round 0 is before
    training. Memory is the predicted peak of the round's clients.
    """
    keys = _keys(runs)
    header = [
        *("suite", "method", "seed", "round", "clients", "failed", *_ROUND),
        *("simulated_seconds", "peak_bytes_max", "peak_over_budget_max"),
        *(f"{scope}:{split}:{task}:{metric}" for scope, task, metric, split in keys),
    ]
    rows: list[list[Any]] = []
    for run in runs:
        values = {k: values_at(run, *k) for k in keys if k in run.by_measure}
        rounds = {r.round: r for r in run.rounds}
        numbers = sorted(rounds.keys() | {n for found in values.values() for n in found})
        for number in numbers:
            r = rounds.get(number)
            row: list[Any] = [run.suite, run.method, run.seed, number]
            if r is None:
                row += [""] * (len(_ROUND) + 5)
            else:
                clients = [run.clients[c] for c in r.clients if c in run.clients]
                row += [len(r.clients), len(r.failed), *(getattr(r, name) for name in _ROUND)]
                row.append(round(r.seconds, 3))
                row.append(max((c.predicted_bytes for c in clients), default=""))
                shares = [c.predicted_bytes / c.budget_bytes for c in clients if c.budget_bytes]
                row.append(round(max(shares), 4) if shares else "")
            for key in keys:
                value = values.get(key, {}).get(number)
                row.append("" if value is None else round(value.value, 5))
            rows.append(row)
    return _text(header, rows)


def last_values(runs: Sequence[Run]) -> str:
    """A line per run, scope, split and measure: its value before training and in the last scored round."""
    rows: list[list[Any]] = []
    for run in runs:
        for key in _keys([run]):
            scope, task, metric, split = key
            assert split in SPLITS[scope]
            values = values_at(run, *key)
            last = max(values)
            before = round(values[0].value, 5) if 0 in values else ""
            found = run.by_measure[key]
            rows.append(
                [run.suite, run.method, run.seed, scope, split, task, metric]
                + [sum(s.rows for s in found if s.round == last), before, last]
                + [round(values[last].value, 5)]
            )
    header = ("suite", "method", "seed", "scope", "split", "task", "metric", "rows")
    return _text([*header, "before", "round", "value"], rows)
