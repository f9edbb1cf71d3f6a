"""Tables of variants beside one base: ablations, LoRA rules, codings of the uplink, selection at equal budget."""

from __future__ import annotations

import math
from collections.abc import Mapping

from benchmarks.federated import run_facts
from benchmarks.federated.compare import Interval
from benchmarks.federated.results import SCOPES, Results
from benchmarks.federated.score_tables import (
    SCOPE_WORDS,
    SEEDS_RULE,
    agreed_sign,
    by_seed,
    mark_best,
    method_cell,
    ordered,
    over_seeds,
)
from benchmarks.federated.tables import NONE, Cell, Table, mean_cell, number, range_text


def _difference_cell(found: tuple[Interval, Interval] | None, places: int = 1) -> Cell:
    """The mean difference with its bootstrap interval, Student's in the hint; coloured where both exclude 0."""
    if found is None:
        return Cell(text=NONE)
    boot, paired = found
    text = number(boot.mean, places, plus=True)
    if not math.isnan(boot.low):
        text += f" ({range_text(boot, places)})"
    return Cell(
        text=text,
        hint=f"paired t over {paired.count} seeds: {range_text(paired, places)}",
        mark={1: "good", 0: "", -1: "bad"}[agreed_sign(boot, paired)],
    )


def variants(results: Results, title: str, base: str) -> Table:
    """Methods of an ablation beside `base`: means of tasks and paired differences in both scopes, bytes, "
    "coverage."""
    rows: list[list[Cell | str]] = []
    order = ordered(results, "global")
    if base in order:
        order = [base, *(m for m in order if m != base)]
    for method in order:
        row: list[Cell | str] = [method_cell(results, method)]
        for scope in SCOPES:
            found = results.task_means(method, scope)
            row.append(mean_cell(over_seeds(found), 1, by_seed(found, 1)))
            difference = None
            if base in results.runs and method != base:
                difference = results.difference(method, base, scope, results.primary)
            row.append(_difference_cell(difference))
        both = results.over_seeds(method, run_facts.bytes_both)
        row.append(NONE if both is None else number(both.mean / 1e6))
        row.append(
            mean_cell(results.over_seeds(method, run_facts.last_diagnostic("never_trained")))
        )
        rows.append(row)
    caption = (
        f"{SEEDS_RULE} Differences to {base!r} with the 95 % interval of the hierarchical bootstrap; hover "
        f"for Student's."
        if base in results.runs
        else f"{SEEDS_RULE} No finished run of {base!r} in this suite to compare with."
    )
    words = ("global model, mean of tasks %", f"- {base}", "devices, mean of tasks %", f"- {base}")
    header = ("method", *words, "MB up + down", "experts never trained")
    return Table(title=title, caption=caption, header=header, rows=rows)


def uplink(results: Results) -> Table:
    """Codings of the uplink: accuracy difference to float32 and bytes per parameter."""

    def coding(method: str) -> str:
        run = next(iter(results.runs[method].values()))
        return str(run.settings["method"].get("uplink", method))

    plain = next((m for m in results.runs if coding(m) == "float32"), None)
    order = ("float32", "int8", "int4")
    methods = sorted(
        results.runs, key=lambda m: (order.index(coding(m)) if coding(m) in order else 3, m)
    )
    base_up = results.over_seeds(plain, run_facts.bytes_up) if plain else None
    rows: list[list[Cell | str]] = []
    for method in methods:
        row: list[Cell | str] = [method_cell(results, method), coding(method)]
        for scope in SCOPES:
            found = results.task_means(method, scope)
            row.append(mean_cell(over_seeds(found), 1, by_seed(found, 1)))
            difference = None
            if plain is not None and method != plain:
                difference = results.difference(method, plain, scope, results.primary)
            row.append(_difference_cell(difference, 2))
        per = results.over_seeds(method, run_facts.bytes_per_parameter)
        up = results.over_seeds(method, run_facts.bytes_up)
        if per is not None:
            row.append(Cell(text=number(per.mean, 2), hint="bytes sent / parameters sent"))
        elif up is not None and base_up is not None and base_up.mean > 0:
            text = f"{number(4 * up.mean / base_up.mean, 2)} (estimated)"
            row.append(Cell(text=text, hint="4 bytes x bytes up / bytes up of float32"))
        else:
            row.append(NONE)
        row.append(NONE if up is None else number(up.mean / 1e6))
        rows.append(row)
    header = (
        "method",
        "uplink",
        "global model, mean of tasks %",
        "- float32",
        "devices, mean of tasks %",
        "- float32",
        "bytes per parameter",
        "MB up",
    )
    caption = (
        f"{SEEDS_RULE} Differences in points with the 95 % interval of the hierarchical bootstrap."
    )
    return Table(
        title="Coding of the uplink", caption=caption, header=header, rows=rows, left=2
    )  # fmt: skip


def selection(budgets: Mapping[int, Results]) -> Table:
    """Selection methods at equal budget: mean of tasks in both scopes at every budget."""
    methods: list[str] = []
    for results in budgets.values():
        methods += [m for m in ordered(results, "global") if m not in methods]
    header = ["method"]
    for scope in SCOPES:
        header += [f"{SCOPE_WORDS[scope].lower()}, {b} %" for b in sorted(budgets)]
    columns = []
    for scope in SCOPES:
        for budget in sorted(budgets):
            results = budgets[budget]
            found = [results.task_means(m, scope) if m in results.runs else {} for m in methods]
            intervals = [over_seeds(f) for f in found]
            cells = [mean_cell(i, 1, by_seed(f, 1)) for i, f in zip(intervals, found, strict=True)]
            means = [math.nan if i is None else i.mean for i in intervals]
            columns.append(mark_best(cells, means, False))
    ours = next(iter(budgets.values())).ours
    rows: list[list[Cell | str]] = [
        [Cell(text=m, mark="ours" if m == ours else ""), *(column[i] for column in columns)]
        for i, m in enumerate(methods)
    ]
    caption = (
        f"Mean of tasks in percent by the share of the experts that a device can hold. {SEEDS_RULE} The "
        f"oracle scores "
        "experts by leaving each out, which no device can afford: it is a ceiling, not a baseline."
    )
    return Table(
        title="Selection at equal budget", caption=caption, header=header, rows=rows
    )  # fmt: skip


def selection_differences(budgets: Mapping[int, Results]) -> Table:
    """Ours minus every other selection method at every budget, in both scopes."""
    ours = next(iter(budgets.values())).ours
    methods = sorted({m for results in budgets.values() for m in results.runs} - {ours})
    header = ["ours minus"]
    for scope in SCOPES:
        header += [f"{SCOPE_WORDS[scope].lower()}, {b} %" for b in sorted(budgets)]
    rows: list[list[Cell | str]] = []
    for method in methods:
        row: list[Cell | str] = [method]
        for scope in SCOPES:
            for budget in sorted(budgets):
                results = budgets[budget]
                both = ours in results.runs and method in results.runs
                row.append(
                    _difference_cell(
                        results.difference(ours, method, scope, results.primary) if both else None
                    )
                )
        rows.append(row)
    caption = (
        "Paired difference of the mean of tasks, in points, with the 95 % interval of the hierarchical bootstrap; "
        "hover for Student's over seeds. Coloured where both exclude 0."
    )
    return Table(title="Ours minus the others", caption=caption, header=header, rows=rows)
