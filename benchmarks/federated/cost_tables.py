"""Tables of what a method costs and how much it depends on the setting."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

from benchmarks.federated import run_facts
from benchmarks.federated.compare import coefficient_of_variation
from benchmarks.federated.results import SCOPES, Results
from benchmarks.federated.score_tables import (
    SCOPE_WORDS,
    method_cell,
    ordered,
    over_seeds,
)
from benchmarks.federated.tables import NONE, Cell, Table, mean_cell, number


def costs(results: Results) -> Table:
    """Bytes, memory, simulated time, coverage, forgetting and failures by method."""
    reference = (
        results.over_seeds(results.reference, run_facts.bytes_both)
        if results.reference in results.runs
        else None
    )
    rows: list[list[Cell | str]] = []
    for method in ordered(results, "global"):

        def over(
            what: Callable[..., float | None], unit: float = 1, places: int = 1, m: str = method
        ) -> Cell:
            found = results.over_seeds(m, what)
            if found is None:
                return Cell(text=NONE)
            low, high = found.low / unit, found.high / unit
            return Cell(
                text=number(found.mean / unit, places),
                hint=f"{found.count} seeds"
                + ("" if math.isnan(low) else f", {number(low, places)} to {number(high, places)}"),
            )

        both = results.over_seeds(method, run_facts.bytes_both)
        share = NONE
        if reference and both and reference.mean > 0:
            share = f"{100 * both.mean / reference.mean:.0f} %"
        clients = [c for run in results.runs[method].values() for c in run.clients.values()]
        within = results.within_budget(method)
        peak = max(
            (c.predicted_bytes / c.budget_bytes for c in clients if c.budget_bytes), default=0
        )
        rows.append(
            [
                method_cell(results, method),
                over(run_facts.bytes_up, 1e6),
                over(run_facts.bytes_down, 1e6),
                share,
                over(run_facts.profile_bytes, 1e6),
                NONE
                if not clients
                else number(float(np.mean([c.predicted_bytes for c in clients])) / 2**20),
                Cell(
                    text=f"{100 * peak:.0f} %" if clients else NONE, mark="bad" if peak > 1 else ""
                ),
                Cell(
                    text=NONE if math.isnan(within) else f"{100 * within:.0f} %",
                    mark="bad" if within < 1 else "",
                ),
                over(run_facts.simulated_seconds, 60),
                over(run_facts.last_diagnostic("trained_experts"), 1, 0),
                over(run_facts.last_diagnostic("never_trained"), 1, 1),
                over(run_facts.last_diagnostic("coverage_cv"), 1, 2),
                over(run_facts.mean_diagnostic("missed_mass"), 1, 3),
                over(run_facts.mean_diagnostic("routing_consistency"), 1, 3),
                mean_cell(results.over_seeds(method, run_facts.forgetting), 3),
                over(run_facts.failures, 1, 1),
            ]
        )
    header = (
        "method",
        "MB up",
        "MB down",
        f"bytes / {results.reference}",
        "MB once, to profile",
        "peak MB, mean device",
        "worst peak / budget",
        "devices in budget",
        "minutes (simulated)",
        "experts trained, last round",
        "never trained",
        "coverage CV",
        "missed mass",
        "routing consistency",
        "forgetting, nats",
        "failures",
    )
    caption = (
        "Per run, mean over seeds. MB of traffic are 10^6 bytes over all devices and rounds, leases of the last "
        "measurement among them; what is streamed once to profile the full model depends on no round and stands "
        "apart. MB of memory are 2^20 bytes, "
        "predicted by the planner. Minutes come from a model of each device (its profile), not from a "
        "device: a round lasts "
        "as long as its slowest device. Coverage CV is the coefficient of variation of how often each "
        "expert was trained, "
        "after the last round. Forgetting is the held-out text's loss after training minus before: above 0 "
        "is worse. "
        "† exceeds some device's memory budget."
    )
    return Table(title="Costs, coverage and forgetting", caption=caption, header=header, rows=rows)


def robustness(suites: Sequence[Results]) -> list[Table]:
    """Coefficient of variation of the mean of tasks over the main suites that share their tasks."""
    groups: dict[tuple[tuple[str, str], ...], list[Results]] = {}
    for results in suites:
        if results.primary:
            groups.setdefault(results.primary, []).append(results)
    tables = []
    for pairs, members in groups.items():
        if len(members) < 2:
            continue
        methods = sorted(set.intersection(*(set(r.runs) for r in members)))
        rows: list[tuple[float, list[Cell | str]]] = []
        for method in methods:
            row: list[Cell | str] = [
                Cell(text=method, mark="ours" if method == members[0].ours else "")
            ]
            first = math.inf
            for scope in SCOPES:
                means = [over_seeds(r.task_means(method, scope)) for r in members]
                if any(m is None for m in means):
                    row += [NONE, NONE, NONE]
                    continue
                values = [m.mean for m in means if m is not None]
                index = coefficient_of_variation(values)
                if scope == "global":
                    first = index
                hint = ", ".join(
                    f"{r.suite}: {number(v)}" for r, v in zip(members, values, strict=True)
                )
                row += [
                    Cell(text=number(index, 4), hint=hint),
                    number(float(np.mean(values))),
                    number(min(values)),
                ]
            rows.append((first, row))
        names = ", ".join(r.suite for r in members)
        tasks = ", ".join(task for task, _ in pairs)
        header = ["method"]
        for scope in SCOPES:
            word = SCOPE_WORDS[scope].lower()
            header += [f"{word}: index", f"{word}: mean %", f"{word}: worst suite %"]
        tables.append(
            Table(
                title=f"Robustness over {names}",
                caption="Index: standard deviation (n - 1) over mean of the method's mean of tasks "
                f"({tasks}) over the suites; smaller depends less on the setting. A method that is bad "
                f"everywhere has "
                "a small index too, so mean and worst suite stand beside it.",
                header=header,
                rows=[row for _, row in sorted(rows, key=lambda e: e[0])],
            )
        )
    return tables
