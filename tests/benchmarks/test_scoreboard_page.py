"""Three methods, two suites and three seeds whose numbers are known by hand, all the way to the page."""

import csv
import json
import re
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.federated import page, page_sections
from benchmarks.federated.cost_tables import costs, robustness
from benchmarks.federated.read_runs import RunsError, read_run, read_runs
from benchmarks.federated.results import Results
from benchmarks.federated.score_tables import against_best, scores, to_target
from benchmarks.federated.tables import Cell, to_markdown

ACCURACY = {"ours": (60, 62, 64), "fedit": (55, 56, 57), "random": (40, 44, 42)}
"""Rows of 100 that are right, by seed, in the suite "even"; 4 fewer in "skewed"."""
DEVICES = {"ours": (0.7, 0.9), "fedit": (0.6, 0.8), "random": (0.5, 0.5)}
"""The two devices' own accuracy, every seed."""
LOSS = {"ours": 2.0, "fedit": 2.5, "random": 3.0}
"""Answer loss of squad at the end; 4 before."""


def score(round, task, metric, value, split="test", **more):
    line = {"kind": "score", "round": round, "scope": "global", "split": split, "task": task}
    return line | {"metric": metric, "value": value, "rows": 100} | more


def lines(suite, method, seed):
    right = ACCURACY[method][seed] - (4 if suite == "skewed" else 0)
    per_row = np.packbits(np.arange(100) < right).tobytes().hex()
    big = method == "fedit"
    client = {
        "tasks": ["agnews"],
        "rows": 9,
        "budget": 0.3,
        "experts": 4,
        "budget_bytes": 100 << 20,
    }
    clients = {
        "c00": client | {"predicted_bytes": (150 if big else 80) << 20},
        "c01": client | {"predicted_bytes": 90 << 20},
    }
    yield {"kind": "run", "suite": suite, "method": method, "seed": seed,
           "profile_bytes": 0 if big else 3_000_000, "clients": clients,
           "settings": {"method": {"lr": 0.1 if big else 0.2, "rank": 8}}}  # fmt: skip
    yield score(0, "agnews", "accuracy", 0.25)
    yield score(0, "squad", "f1", 0.1)
    yield score(0, "squad", "answer_loss", 4.0)
    yield score(0, "heldout", "lm_loss", 3.0)
    for number in (1, 2):
        yield {"kind": "round", "round": number, "clients": ["c00", "c01"],
               "failed": ["c01"] if number == 2 and method == "random" else [],
               "bytes_up": 4_000_000 if big else 1_000_000, "bytes_down": 1_000_000,
               "device_seconds": {"c00": 60.0, "c01": 30.0 * number}, "loss_first": 2.0, "loss_last": 1.0,
               "trained_experts": 8, "never_trained": 8 - 2 * number, "coverage_cv": 1 / number,
               "missed_mass": 0.1, "routing_consistency": None}  # fmt: skip
        final = number == 2
        yield score(number, "agnews", "accuracy", right / 100 if final else (right - 6) / 100,
                    **({"per_row": per_row} if final else {}))  # fmt: skip
        yield score(number, "squad", "f1", 0.2 if big else 0.3)
        yield score(number, "squad", "answer_loss", LOSS[method] if final else 4.0)
    for client, value in zip(("c00", "c01"), DEVICES[method], strict=True):
        yield {"kind": "score", "round": 2, "scope": "device", "client": client, "split": "held_back",
               "task": "agnews", "metric": "accuracy", "value": value, "rows": 10}  # fmt: skip
    yield score(2, "heldout", "lm_loss", 3.25)
    yield {"kind": "end", "seconds": 36.0, "bytes_down": 2_000_000 if big else 500_000}


def put(folder, suite, method, seed, content):
    path = folder / suite / method / f"{seed}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in content))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    (folder / ".base" / "cut").mkdir(parents=True)
    (folder / ".base" / "cut" / "slicing.jsonl").write_text('{"done": 1}\n')  # not a run
    for suite in ("even", "skewed"):
        for method in ACCURACY:
            for seed in range(3):
                put(folder, suite, method, seed, lines(suite, method, seed))
    return folder


@pytest.fixture(scope="module")
def even(folder):
    return Results("even", read_runs(folder), ours="ours", reference="fedit")


def texts(table):
    return [[c.text if isinstance(c, Cell) else c for c in row] for row in table.rows]


def column(table, head, key=0):
    index = list(table.header).index(head)
    return {row[key].removesuffix(" †"): row[index] for row in texts(table)}


def test_scores_of_the_global_model(even):
    table = scores(even, "global")
    accuracy = column(table, "agnews, accuracy %", key=1)
    # sd 2 and 1: 4.303 * 2 / sqrt(3) = 4.97, half of it for the other
    assert accuracy == {"ours": "62.0 ± 5.0", "fedit": "56.0 ± 2.5", "random": "42.0 ± 5.0"}
    means = column(table, "mean of tasks, %", key=1)
    assert means["ours"] == "46.0 ± 2.5"  # (62 + 30) / 2
    assert means["fedit"] == "38.0 ± 1.2"
    assert means["random"] == "36.0 ± 2.5"
    assert column(table, "rank", key=1) == {"ours": "1", "fedit": "2", "random": "3"}
    gone = column(table, "answer loss taken away, mean %", key=1)
    assert gone == {"ours": "50.0 ± 0.0", "fedit": "37.5 ± 0.0", "random": "25.0 ± 0.0"}
    best = [row for row in table.rows if row[1].text == "ours"][0]
    assert [c.mark for c in best[2:]] == ["best"] * 5


def test_devices_stand_in_their_own_table(even):
    table = scores(even, "device")
    found = column(table, "agnews, accuracy %", key=1)
    assert found == {"ours": "80.0 ± 0.0", "fedit": "70.0 ± 0.0", "random": "50.0 ± 0.0"}
    assert column(table, "squad, F1 %", key=1)["ours"] == "–"


def test_ours_against_the_best_baseline_of_each_task(even):
    rows = {(row[0], row[2]): row for row in texts(against_best(even, "global"))}
    accuracy = rows["agnews, accuracy %", "any"]
    assert accuracy[3:6] == ["fedit †", "56.0 ± 2.5", "+6.0"]
    # paired differences 5, 6, 7: mean 6, half 4.303 / sqrt(3) = 2.48
    assert accuracy[7:] == ["+3.5 to +8.5", "ahead"]
    low, high = map(float, accuracy[6].split(" to "))
    assert 0 < low < 5 < 7 < high < 12
    # Each task has its own best baseline, in any scope of budgets.
    assert rows["squad, F1 %", "any"][3] == "random"
    assert rows["agnews, accuracy %", "in budget"][3] == "random"
    loss = rows["squad, answer loss, nats", "any"]
    assert loss[3:6] == ["fedit †", "2.500 ± 0.000", "-0.500"]
    assert loss[-1] == "ahead"
    # 80 - 70 on each of two devices
    device = texts(against_best(even, "device"))[0]
    assert device[5:] == ["+10.0", "+10.0 to +10.0", "+10.0 to +10.0", "ahead"]


def test_costs_by_hand(even):
    table = costs(even)
    assert column(table, "MB up") == {"ours": "2.0", "fedit": "8.0", "random": "2.0"}
    assert column(table, "bytes / fedit") == {"ours": "38 %", "fedit": "100 %", "random": "38 %"}
    assert column(table, "MB down") == {"ours": "2.5", "fedit": "4.0", "random": "2.5"}
    assert column(table, "MB once, to profile")["ours"] == "3.0"
    assert column(table, "devices in budget") == {
        "ours": "100 %",
        "fedit": "50 %",
        "random": "100 %",
    }
    assert column(table, "worst peak / budget")["fedit"] == "150 %"
    assert column(table, "peak MB, mean device") == {
        "ours": "85.0",
        "fedit": "120.0",
        "random": "85.0",
    }
    assert column(table, "minutes (simulated)")["ours"] == "2.0"  # 60 s and 60 s
    assert column(table, "never trained")["ours"] == "4.0"
    assert column(table, "coverage CV")["ours"] == "0.50"
    assert column(table, "routing consistency")["ours"] == "–"
    assert column(table, "forgetting, nats")["ours"] == "0.250 ± 0.000"
    assert column(table, "failures") == {"ours": "0.0", "fedit": "0.0", "random": "1.0"}
    assert "fedit †" in [row[0] for row in texts(table)]


def test_rounds_to_the_target(even):
    # Target of agnews: fedit's 56; 90 % is 50.4, 99 % is 55.44. ours after a round: 54, 56, 58; fedit: 49, 50, 51.
    rows = {row[0].removesuffix(" †"): row for row in texts(to_target(even, "global"))}
    assert rows["ours"][1:3] == ["1.0 rounds, 1.0 min", "1.3 rounds, 1.3 min"]
    assert rows["fedit"][1:3] == ["1.7 rounds, 1.7 min", "2.0 rounds, 2.0 min (2 of 3 seeds)"]
    assert rows["random"][1:3] == ["not reached", "not reached"]
    found = even.reaching("ours", "global", "agnews", "accuracy", 0.99)
    assert found == [(2, 120.0), (1, 60.0), (1, 60.0)]


def test_robustness_over_suites(folder):
    runs = read_runs(folder)
    both = [Results(s, runs, ours="ours", reference="fedit") for s in ("even", "skewed")]
    (table,) = robustness(both)
    # means of tasks 46 and 44: sd sqrt(2), mean 45
    assert column(table, "global model: index")["ours"] == f"{2**0.5 / 45:.4f}"
    assert column(table, "global model: worst suite %")["ours"] == "44.0"


def test_the_page_needs_no_other_file(folder, tmp_path, capsys):
    assert page.main(["--runs", str(folder), "--out", str(tmp_path / "out")]) == 0
    written = tmp_path / "out" / "index.html"
    assert capsys.readouterr().out.strip() == str(written)
    text = written.read_text()
    assert "://" not in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert "62.0 ± 5.0" in text
    assert "--runs" in text  # the command
    assert "18 runs finished and counted, 0 unfinished and 0 missing" in text
    assert (tmp_path / "out" / "even_curves_global.png").read_bytes().startswith(b"\x89PNG")
    assert "| 1 | ours | **46.0 ± 2.5** |" in (tmp_path / "out/tables/suite-even.md").read_text()
    rows = list(csv.DictReader((tmp_path / "out" / "rounds.csv").read_text().splitlines()))
    assert len(rows) == 18 * 3
    (row,) = [
        r
        for r in rows
        if (r["suite"], r["method"], r["seed"], r["round"]) == ("even", "ours", "1", "2")
    ]
    assert row["global:test:agnews:accuracy"] == "62.0"
    assert row["device:held_back:agnews:accuracy"] == "80.0"
    assert (row["bytes_up"], row["peak_bytes_max"]) == ("1000000", str(90 << 20))
    assert page.main(["--runs", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert written.read_text() == text  # the same runs give the same page


def test_unfinished_and_missing_runs_are_listed_and_not_counted(folder, tmp_path):
    for method in ("ours", "fedit"):
        for seed in (0, 1):
            put(tmp_path / "runs", "even", method, seed, lines("even", method, seed))
    cut = list(lines("even", "ours", 2))[:-1]
    put(tmp_path / "runs", "even", "ours", 2, cut)
    runs = read_runs(tmp_path / "runs")
    assert Results("even", runs, ours="ours", reference="fedit").seeds == (0, 1)
    out = tmp_path / "out"
    text = page.write(runs, out, ours="ours", reference="fedit", command="c").read_text()
    assert "4 runs finished and counted, 1 unfinished and 1 missing" in text
    listed = (out / "tables" / "runs-that-are-missing-or-unfinished.md").read_text()
    assert "| even | ours | 2 | *unfinished, last round 2* |" in listed
    assert "| even | fedit | 2 | *missing* |" in listed
    assert "Fewer than three seeds" in text


def test_a_killed_writer_leaves_an_unfinished_run(tmp_path):
    path = put(tmp_path, "even", "ours", 0, list(lines("even", "ours", 0))[:-1])
    with path.open("a") as file:
        file.write('{"kind":"sco')
    assert not read_run(path).finished
    path.write_text("")
    assert not read_run(path).finished


BAD = {
    "not JSON": ("{oops\n", "not JSON"),
    "a list": ("[]\n", "found list, wanted a JSON object"),
    "a kind": ('{"kind":"sum"}\n', "'kind' is 'sum', wanted one of run, round, score, end"),
    "percent": (json.dumps(score(1, "agnews", "accuracy", 62.0)), "a fraction between 0 and 1"),
    "rows": (json.dumps(score(1, "a", "accuracy", 0.5, per_row="ff")), "13 bytes for 100 rows"),
    "hex": (json.dumps(score(1, "a", "accuracy", 0.5, per_row="xy")), "hexadecimal digits"),
    "split": (json.dumps(score(1, "a", "accuracy", 0.5, split="train")), "validation, test"),
    "metric": (json.dumps(score(1, "a", "bleu", 0.5)), "one of accuracy"),
    "round": (json.dumps(score(-1, "a", "f1", 0.5)), "'round' is -1, wanted a whole number"),
    "missing": ('{"kind":"end"}\n', "'seconds' is nothing, wanted a number"),
    "second head": ('{"kind":"run"}\n', "found a second line"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_malformed_line_is_one_line_with_its_place(what, tmp_path, capsys):
    path = put(tmp_path, "even", "ours", 0, list(lines("even", "ours", 0))[:3])
    text, message = BAD[what]
    with path.open("a") as file:
        file.write(text.rstrip("\n") + "\n")
    assert page.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert f"{path}:4: " in error
    assert message in error


def test_a_file_in_the_wrong_place_and_an_empty_folder(tmp_path):
    path = put(tmp_path, "even", "ours", 1, lines("even", "ours", 0))
    with pytest.raises(RunsError, match="its place says"):
        read_run(path)
    with pytest.raises(RunsError, match="found no run"):
        read_runs(tmp_path / "nothing")


def test_a_diverged_run_is_shown_as_such(tmp_path):
    for seed in (0, 1):
        content = list(lines("even", "ours", seed))
        for line in content:
            if seed == 1 and line.get("metric") == "answer_loss" and line["round"] == 2:
                line["value"] = float("nan")
        put(tmp_path, "even", "ours", seed, content)
        put(tmp_path, "even", "fedit", seed, lines("even", "fedit", seed))
    results = Results("even", read_runs(tmp_path), ours="ours", reference="fedit")
    assert (
        column(scores(results, "global"), "squad, answer loss, nats", key=1)["ours"] == "diverged"
    )
    assert "| diverged |" in to_markdown(scores(results, "global"))


def test_the_grid_of_learning_rates_is_shown(folder, tmp_path):
    tuned = tmp_path / "tuned.json"
    grid = {"ours": {"grid": {"0.003": 0.7312, "0.01": 0.5}, "learning_rate": 0.003}}
    tuned.write_text(json.dumps({"agnews": grid}))
    flags = ["--runs", str(folder), "--out", str(tmp_path / "out"), "--tuned", str(tuned)]
    assert page.main(flags) == 0
    table = (tmp_path / "out" / "tables" / "learning-rates.md").read_text()
    assert "| ours | **0.731** | 0.500 |" in table


def test_a_file_that_is_no_grid_is_one_line(folder, tmp_path, capsys):
    tuned = tmp_path / "tuned.json"
    tuned.write_text('{"agnews": {"ours": 3}}')
    flags = ["--runs", str(folder), "--out", str(tmp_path / "out"), "--tuned", str(tuned)]
    assert page.main(flags) == 2
    found = capsys.readouterr().err
    assert f"{tuned}: not a file of tuned values" in found
    assert found.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_methods_that_hold_everything_are_no_baselines_of_the_overview(folder):
    runs = [
        replace(run, settings={"method": {"over_budget": run.method == "fedit"}})
        for run in read_runs(folder)
    ]
    [results] = [Results("even", runs, ours="ours", reference="fedit")]
    table = page_sections.overview([results]).tables[0]
    assert column(table, "best baseline") == {"even": "random"}
    assert column(table, "rank") == {"even": "1 of 2"}
