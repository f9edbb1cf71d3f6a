"""Tables of scores: methods by tasks, ours against the best baseline, rounds and time to the target."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.federated.compare import Interval, t_interval
from benchmarks.federated.read_runs import PRIMARY
from benchmarks.federated.results import Results, lower_is_better
from benchmarks.federated.tables import NONE, Cell, Table, mean_cell, number, range_text

SCOPE_WORDS = {"global": "Global model", "device": "Devices"}
SCOPE_RULES = {
    "global": "The whole model with the aggregated adapter, on the test rows, after the last round: "
    "what the operator gets.",
    "device": "Mean over the devices of each device's own sub-MoE on its own held-back rows, after the last "
    "round: what "
    "the owners of the devices get. Every device counts once.",
}
METRIC_WORDS = {
    "accuracy": "accuracy %",
    "f1": "F1 %",
    "rouge2": "ROUGE-2 %",
    "answer_loss": "answer loss, nats",
    "lm_loss": "text loss, nats",
}
SEEDS_RULE = "Mean ± half of the 95 % interval over seeds (Student's t)."
SHARES = (0.90, 0.99)


def digits(metric: str) -> int:
    """Decimals of a measure: percent have one, nats three."""
    return 1 if metric in PRIMARY else 3


def measure_name(task: str, metric: str) -> str:
    """For example "agnews, accuracy %"."""
    return f"{task}, {METRIC_WORDS[metric]}"


def by_seed(values: Mapping[int, float], places: int) -> str:
    """Every seed's value, for a cell's hint."""
    return ", ".join(f"seed {seed}: {number(v, places)}" for seed, v in sorted(values.items()))


def over_seeds(found: Mapping[int, float]) -> Interval | None:
    """Mean and interval of one value per seed; None without values."""
    return t_interval(list(found.values())) if found else None


def mark_best(column: Sequence[Cell], means: Sequence[float], lower: bool) -> list[Cell]:
    """The column with its best cells marked; `means` are its values, NaN where there is none."""
    known = [v for v in means if not math.isnan(v)]
    best = (min(known) if lower else max(known)) if known else math.nan
    return [
        Cell(text=c.text, hint=c.hint, mark="best") if v == best else c
        for c, v in zip(column, means, strict=True)
    ]


def method_cell(results: Results, method: str) -> Cell:
    """The method's name; over its budget it is marked."""
    within = results.within_budget(method)
    if within < 1:
        share = f"{100 * within:.0f} % of the devices' predicted peaks are within their budget"
        return Cell(text=f"{method} †", hint=f"exceeds the memory budget: {share}", mark="bad")
    return Cell(text=method, mark="ours" if method == results.ours else "")


def ordered(results: Results, scope: str) -> list[str]:
    """Every method, the ranked ones first."""
    ranked = [method for method, _ in results.ranking(scope)]
    return ranked + [m for m in results.runs if m not in ranked]


def scores(results: Results, scope: str) -> Table:
    """Methods x tasks in one scope, ranked by the mean of tasks."""
    order = ordered(results, scope)
    ranked = {method for method, _ in results.ranking(scope)}
    columns: list[list[Cell]] = []
    heads = []

    def add(head: str, found: Sequence[Mapping[int, float]], places: int, lower: bool) -> None:
        heads.append(head)
        intervals = [over_seeds(values) for values in found]
        cells = [
            mean_cell(i, places, by_seed(values, places))
            for i, values in zip(intervals, found, strict=True)
        ]
        means = [math.nan if i is None else i.mean for i in intervals]
        columns.append(mark_best(cells, means, lower))

    if len(results.primary) > 1:
        add("mean of tasks, %", [results.task_means(m, scope) for m in order], 1, False)
    for task, metric in results.measures:
        found = [results.finals(m, scope, task, metric) for m in order]
        add(measure_name(task, metric), found, digits(metric), lower_is_better(metric))
    caption = f"{SCOPE_RULES[scope]} {SEEDS_RULE} The best of a column is bold."
    if results.losses:
        found = [results.loss_reductions(m, scope) for m in order]
        add("answer loss taken away, mean %", found, 1, False)
        tasks = ", ".join(task for task, _ in results.losses)
        caption += (
            f" Losses: lower is better. The last column is the mean over {tasks} of the share of the answer "
            f"loss before "
            "training that is gone after it."
        )
    rows: list[list[Cell | str]] = [
        [
            str(place) if m in ranked else NONE,
            method_cell(results, m),
            *(column[place - 1] for column in columns),
        ]
        for place, m in enumerate(order, start=1)
    ]
    header = ("rank", "method", *heads)
    title = f"{SCOPE_WORDS[scope]}: scores"
    return Table(title=title, caption=caption, header=header, rows=rows, left=2)


def agreed_sign(boot: Interval, paired: Interval) -> int:
    """1 or -1 where the bootstrap's and Student's interval lie on the same side of 0, else 0."""
    return boot.sign if boot.sign == paired.sign else 0


def _verdict(boot: Interval, paired: Interval, lower: bool) -> Cell:
    if math.isnan(boot.low):
        return Cell(text=NONE, hint="too few seeds for an interval")
    side = -boot.sign if lower else boot.sign
    if not side:
        return Cell(text="not told apart")
    word = "ahead" if side > 0 else "behind"
    if not agreed_sign(boot, paired):
        return Cell(
            text=f"{word} (bootstrap only)", hint="Student's interval over seeds includes 0"
        )
    return Cell(text=word, mark="good" if side > 0 else "bad")


def against_best(results: Results, scope: str) -> Table:
    """Ours against the best baseline of each task and of the mean, over all baselines and over those "
    "within budget."""
    ours = results.ours
    everyone = results.rivals()
    fitting = tuple(m for m in everyone if not results.within_budget(m) < 1)
    rows: list[list[Cell | str]] = []

    def add(what: str, rival: str, whose: str, pairs: Sequence[tuple[str, str]]) -> None:
        places, lower = digits(pairs[0][1]), lower_is_better(pairs[0][1])
        difference = results.difference(ours, rival, scope, pairs)

        def mean(method: str) -> Interval | None:
            if len(pairs) > 1:
                return over_seeds(results.task_means(method, scope))
            return results.interval(method, scope, *pairs[0])

        values: list[Cell | str] = [what, mean_cell(mean(ours), places)]
        values += [whose, method_cell(results, rival)]
        values.append(mean_cell(mean(rival), places))
        if difference is None:
            rows.append([*values, NONE, NONE, NONE, NONE])
            return
        boot, paired = difference
        rows.append(
            [
                *values,
                Cell(text=number(boot.mean, places, plus=True), hint=f"{boot.count} seeds"),
                range_text(boot, places),
                range_text(paired, places),
                _verdict(boot, paired, lower),
            ]
        )

    def best_mean(among: Sequence[str]) -> str | None:
        ranked = [m for m, i in results.ranking(scope) if m in among and not math.isnan(i.mean)]
        return ranked[0] if ranked else None

    if ours in results.runs:
        for whose, among in (("any", everyone), ("in budget", fitting)):
            if whose != "any" and fitting == everyone:
                continue
            rival = best_mean(among)
            if rival and len(results.primary) > 1:
                add("mean of tasks, %", rival, whose, results.primary)
            for pair in results.measures:
                best = results.best(scope, *pair, among)
                if best and results.interval(ours, scope, *pair) is not None:
                    add(measure_name(*pair), best[0], whose, [pair])
    header = (
        "measure",
        "ours",
        "baselines",
        "best baseline",
        "its value",
        "ours - it",
        "95 % interval",
        "paired t over seeds",
        "verdict",
    )
    drawn = "rows where right and wrong are known per row" if scope == "global" else "devices"
    caption = (
        "The baseline is the best of each task after the fact, which favours the baseline. The interval draws seeds "
        f"and, within a seed, {drawn} again (hierarchical bootstrap); with few seeds it is too narrow, so Student's "
        "paired interval over seeds stands beside it. Ahead and behind: both intervals exclude 0."
    )
    if not rows:
        caption = f"No finished run of {ours!r} beside a baseline in this suite."
    title = f"{SCOPE_WORDS[scope]}: ours against the best baseline"
    return Table(title=title, caption=caption, header=header, rows=rows, left=1)


def to_target(results: Results, scope: str) -> Table:
    """Rounds and simulated time until 90 % and 99 % of the target, by task."""
    measures = [
        pair for pair in results.primary if not math.isnan(results.target(scope, *pair))
    ]  # fmt: skip
    header = ["method"]
    for pair in measures:
        split = results.curve_split(scope, *pair)
        goal = f"{number(results.target(scope, *pair))} % on {split.replace('_', ' ')} rows"
        header += [f"{pair[0]}: {100 * share:.0f} % of {goal}" for share in SHARES]
    rows: list[list[Cell | str]] = []
    for method in ordered(results, scope):
        row: list[Cell | str] = [method_cell(results, method)]
        for pair in measures:
            for share in SHARES:
                found = results.reaching(method, scope, *pair, share)
                got = [f for f in found if f is not None]
                if not got:
                    row.append(Cell(text="not reached", hint=f"0 of {len(found)} seeds"))
                    continue
                rounds = float(np.mean([r for r, _ in got]))
                minutes = float(np.mean([s for _, s in got])) / 60
                some = "" if len(got) == len(found) else f" ({len(got)} of {len(found)} seeds)"
                text = f"{number(rounds)} rounds, {number(minutes)} min{some}"
                each = ", ".join("not reached" if f is None else f"round {f[0]}" for f in found)
                row.append(Cell(text=text, hint=each))
        rows.append(row)
    caption = (
        "The target is the best last value of any baseline on that task (mean over seeds). Rounds are those "
        "in which scores "
        "were taken; minutes are simulated. The mean is over the seeds that got there."
    )
    title = f"{SCOPE_WORDS[scope]}: rounds and time to the target"
    return Table(title=title, caption=caption, header=header, rows=rows)
