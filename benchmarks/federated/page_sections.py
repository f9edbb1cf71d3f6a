"""The sections of the scoreboard's page: overview, one per suite, selection, variants, and what is missing."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.federated.compare import Interval
from benchmarks.federated.cost_tables import costs, robustness
from benchmarks.federated.figures import selection_figure, suite_figures
from benchmarks.federated.page_html import Section
from benchmarks.federated.panels import Look
from benchmarks.federated.read_runs import Run, RunsError
from benchmarks.federated.results import SCOPES, SELECTION, Results, kind
from benchmarks.federated.run_facts import bytes_both
from benchmarks.federated.score_tables import (
    SCOPE_WORDS,
    SEEDS_RULE,
    against_best,
    agreed_sign,
    method_cell,
    scores,
    to_target,
)
from benchmarks.federated.tables import NONE, Cell, Table, mean_cell, number, range_text
from benchmarks.federated.variant_tables import selection, selection_differences, uplink, variants

VARIANTS = {
    "ablation": ("Ablation", "What each part of the method adds: the same runs without it."),
    "lora": (
        "LoRA rules",
        "How the devices' LoRA factors become one adapter; everything else is equal.",
    ),
    "uplink": (
        "Uplink",
        "How updates are coded on their way to the server; everything else is equal.",
    ),
}


def all_runs(results: Results) -> list[Run]:
    """The suite's finished runs."""
    return [run for seeds in results.runs.values() for run in seeds.values()]


def _ours_beside_best(results: Results, scope: str) -> list[Cell | str]:
    ours = results.ours
    ranking = results.ranking(scope)
    possible = [m for m in results.rivals() if not results.for_reference(m)]
    rivals = [m for m, i in ranking if m in possible and not math.isnan(i.mean)]
    means: dict[str, Interval] = dict(ranking)
    if ours not in means or not rivals:
        return [NONE] * 5
    place = sum(m in possible for m, _ in ranking[: [m for m, _ in ranking].index(ours)])
    difference = results.difference(ours, rivals[0], scope, results.primary)
    cells: list[Cell | str] = [
        mean_cell(means[ours]),
        f"{place + 1} of {len(rivals) + 1}",
        method_cell(results, rivals[0]),
        mean_cell(means[rivals[0]]),
    ]
    if difference is None:
        return [*cells, NONE]
    boot, paired = difference
    text = number(boot.mean, plus=True)
    if not math.isnan(boot.low):
        text += f" ({range_text(boot)})"
    hint = f"paired t over {paired.count} seeds: {range_text(paired)}"
    mark = {1: "good", 0: "", -1: "bad"}[agreed_sign(boot, paired)]
    return [*cells, Cell(text=text, hint=hint, mark=mark)]


def overview(suites: Sequence[Results]) -> Section:
    """Ours beside the best baseline by mean of tasks: a table for each scope, then bytes and memory."""
    tables = []
    for scope in SCOPES:
        header = (
            "suite",
            "ours, mean of tasks %",
            "rank",
            "best baseline",
            "its mean %",
            "ours - it",
        )
        rows: list[list[Cell | str]] = [[r.suite, *_ours_beside_best(r, scope)] for r in suites]
        tables.append(
            Table(
                title=f"{SCOPE_WORDS[scope]}: ours and the best baseline by mean of tasks",
                caption=f"{SEEDS_RULE} Methods that hold every expert on every device are no baselines here: they "
                "stand in the suites' tables. The difference has the 95 % interval of the hierarchical bootstrap; "
                "Student's paired interval is in the hint.",
                header=header,
                rows=rows,
            )
        )
    rows = []
    for r in suites:
        both = {m: r.over_seeds(m, bytes_both) for m in (r.ours, r.reference) if m in r.runs}
        ours, reference = both.get(r.ours), both.get(r.reference)
        within = r.within_budget(r.ours) if r.ours in r.runs else math.nan
        rows.append(
            [
                r.suite,
                str(len(r.runs)),
                str(len(r.seeds)),
                NONE
                if ours is None or reference is None or reference.mean <= 0
                else f"{100 * ours.mean / reference.mean:.0f} %",
                NONE
                if math.isnan(within)
                else Cell(text=f"{100 * within:.0f} %", mark="good" if within == 1 else "bad"),
            ]
        )
    share = f"ours: bytes / {suites[0].reference}"
    columns = ("suite", "methods", "seeds", share, "ours: devices in budget")
    caption = "Bytes are up and down over the whole run. In budget: the predicted peak memory fits."
    tables.append(Table(title="Bytes and memory", caption=caption, header=columns, rows=rows))
    return Section(title="Overview", text="", tables=tables, figures=[])


def suite_section(results: Results, look: Mapping[str, Look]) -> Section:
    """Everything about one suite."""
    tables = []
    for scope in SCOPES:
        tables += [scores(results, scope), against_best(results, scope)]
    tables.append(costs(results))
    tables += [to_target(results, scope) for scope in SCOPES]
    seeds = ", ".join(map(str, results.seeds))
    return Section(
        title=f"Suite {results.suite}",
        text=f"{len(results.runs)} methods, {len(all_runs(results))} finished runs, seeds {seeds}.",
        tables=tables,
        figures=suite_figures(results, look),
        runs=all_runs(results),
    )


def robustness_section(suites: Sequence[Results]) -> list[Section]:
    """Coefficients of variation, where two suites or more share their tasks."""
    text = "How much each method's result depends on the setting."
    tables = robustness(suites)
    return [Section(title="Robustness", text=text, tables=tables, figures=[])] if tables else []


def selection_section(suites: Sequence[Results], look: Mapping[str, Look]) -> list[Section]:
    """The suites selection-15, -25, -50 together."""
    budgets = {
        int(match[1]): results
        for results in suites
        if (match := SELECTION.fullmatch(results.suite))
    }
    if not budgets:
        return []
    return [
        Section(
            title="Selection of experts",
            text="Which experts a device should hold; everything else is equal.",
            tables=[selection(budgets), selection_differences(budgets)],
            figures=[selection_figure(budgets, look)],
            runs=[run for _, r in sorted(budgets.items()) for run in all_runs(r)],
        )
    ]


def variant_section(results: Results) -> Section:
    """An ablation, the LoRA rules or the uplink codings."""
    what = kind(results.suite)
    word, text = VARIANTS[what]
    if what == "uplink":
        table = uplink(results)
    else:
        table = variants(results, f"Beside {results.ours}", results.ours)
    title = f"{word}: {results.suite}"
    return Section(title=title, text=text, tables=[table], figures=[], runs=all_runs(results))


def tuning_section(path: Path) -> Section:
    """The grid of learning rates, what each method scored on validation rows, and the rate it got.

    Raises RunsError for a file that `python -m benchmarks.federated --tune` has not written.
    """
    tables = []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        for tasks, methods in sorted(found.items()):
            rates = sorted({float(r) for m in methods.values() for r in m["grid"]})
            rows: list[list[Cell | str]] = []
            for name, tuned in sorted(methods.items()):
                grid = {float(r): float(score) for r, score in tuned["grid"].items()}
                chosen = float(tuned["learning_rate"])
                cells = [
                    Cell(
                        text=number(grid[r], 3) if r in grid else NONE, mark="best" * (r == chosen)
                    )
                    for r in rates
                ]
                rows.append([name, *cells])
            header = ("method", *(f"{r:g}" for r in rates))
            tables.append(Table(title=tasks, caption="", header=header, rows=rows))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise RunsError(f"{path}: not a file of tuned values: {error}") from error
    return Section(
        title="Learning rates",
        text="Every method was run with every rate, half as many rounds, in one world that is not among those above, "
        "and got the rate with the best score (bold): the mean of the global model's and the devices' on rows that "
        "are not test rows; accuracy where every task has it, else minus the answer loss.",
        tables=tables,
        figures=[],
    )


def absent(runs: Sequence[Run]) -> Section:
    """Runs that were started and have no end, and seeds that another method of the suite has."""
    rows: list[list[Cell | str]] = []
    unfinished = [run for run in runs if not run.finished]
    for run in unfinished:
        last = max((r.round for r in run.rounds), default=0)
        state = f"unfinished, last round {last}"
        rows.append([run.suite, run.method, str(run.seed), Cell(text=state, mark="bad")])
    there = {(run.suite, run.method, run.seed) for run in runs}
    missing = 0
    for suite in sorted({run.suite for run in runs}):
        seeds = sorted({run.seed for run in runs if run.suite == suite})
        for method in sorted({run.method for run in runs if run.suite == suite}):
            for seed in seeds:
                if (suite, method, seed) not in there:
                    missing += 1
                    rows.append([suite, method, str(seed), Cell(text="missing", mark="bad")])
    text = (
        f"{len(runs) - len(unfinished)} runs finished and counted, {len(unfinished)} unfinished and {missing} missing "
        "(a seed that another method of the suite has); neither is counted."
    )
    header = ("suite", "method", "seed", "state")
    tables = []
    if rows:
        tables.append(Table(title="Not counted", caption="", header=header, rows=rows, left=4))
    return Section(
        title="Runs that are missing or unfinished", text=text, tables=tables, figures=[]
    )
