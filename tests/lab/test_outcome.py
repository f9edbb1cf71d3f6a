import json

import numpy as np
import pytest
from rich.console import Console

from lab import history, live, outcome, report
from lab.history import HistoryError

FACTS = {
    "profile": "pixel_8",
    "lease": "l",
    "attempt": 1,
    "weight": 1.0,
    "rows": 80,
    "tokens": 100,
    "loss_first": 3.0,
    "loss_last": 2.0,
    "accuracy_after": 0.9,
    "loss_before": 3.0,
    "loss_after": 2.0,
    "held_back_rows": 20,
    "missed_mass": [0.2, 0.4],
    "backend": "executorch",
    "baseline_bytes": 400 << 20,
    "budget_bytes": 50 << 20,
    "seconds": 1.0,
    "resident": {"0": [0, 2], "1": [1]},
}


def line(number, work, version, devices, **more):
    return {
        "round": number,
        "work": work,
        "version": version,
        "seconds": 1.5,
        "closed_by": "all",
        "missing": [],
        "rejected": [],
        "devices": devices,
        **more,
    }


def facts(accuracy, steps=0, peak=10, **more):
    trained = {"0": [0, 2], "1": []} if steps else {}  # the second layer's slot is frozen
    return {
        **FACTS,
        "accuracy_before": accuracy,
        "steps": steps,
        "peak_bytes": peak << 20,
        "bytes_up": 100,
        "bytes_down": 1000,
        "trained": trained,
        **more,
    }


HISTORY = [
    line(0, "profile", 0, {"a": facts(0.1), "b": facts(0.3)}),
    line(1, "train", 1, {"a": facts(0.1, 5, peak=30), "b": facts(0.3, 5)}),
    line(
        2,
        "train",
        2,
        {"a": facts(0.5, 5)},
        missing=["b"],
        rejected=[{"device": "b", "reason": "stale"}],
    ),
    line(3, "evaluate", 2, {"a": facts(0.7), "b": facts(0.6, peak=60)}),
]


@pytest.fixture
def result():
    return outcome.gather(
        name="t",
        data="rows",
        test_rows=9,
        labels=4,
        batch={"pixel_8": 8},
        layers=(0, 1),
        experts=3,
        history=HISTORY,
        scores={0: 0.25, 2: 0.75},
        predicted={"pixel_8": 40 << 20},
        slots={"pixel_8": {"int4/0": 1, "int8/4": 1, "int4/4": 1}},
        ceiling=0.9,
    )


def test_accuracy_belongs_to_the_version_a_round_starts_from(result):
    a, b = result.devices
    assert (a.name, a.accuracy, a.before, a.after) == ("a", (0.1, 0.5, 0.7), 0.1, 0.7)
    assert (b.name, b.accuracy, b.before, b.after) == ("b", (0.3, None, 0.6), 0.3, 0.6)
    assert result.mean_device_accuracy() == pytest.approx([0.2, 0.5, 0.65])
    assert result.global_accuracy == (0.25, None, 0.75)
    assert (result.base_accuracy, result.final_accuracy) == (0.25, 0.75)


def test_sums_peaks_and_experts(result):
    a, b = result.devices
    assert (a.peak_bytes, b.peak_bytes) == (30 << 20, 60 << 20)
    assert (a.fits, b.fits) == (True, False)
    assert (a.bytes_down, a.bytes_up, a.updates, a.experts) == (4000, 400, 2, (2, 1))
    assert a.trained == (2, 0)
    assert report.slots_in_words(a) == "1 int8 of rank 4, 1 int4 of rank 4, 1 int4 frozen"
    assert a.missed_mass == pytest.approx(0.3)
    assert result.samples == 3 * 5 * 8
    assert result.trained_rounds["a"].tolist() == [[2, 0, 2], [0, 0, 0]]
    assert result.resident_rounds["a"].tolist() == [[2, 0, 2], [0, 2, 0]]
    assert result.trained_rounds["b"].tolist() == [[1, 0, 1], [0, 0, 0]]


def test_a_device_that_was_stopped_does_not_fit():
    a, _ = outcome.gather(
        name="t", data="d", test_rows=0, labels=1, batch={"pixel_8": 1}, layers=(0, 1), experts=3,
        history=HISTORY, scores={}, predicted={}, slots={}, gone=frozenset("a"),
    ).devices  # fmt: skip
    assert a.peak_bytes < a.budget_bytes
    assert not a.fits


def test_not_measured_is_not_zero():
    rounds = [
        line(0, "profile", 0, {"a": facts(-1.0)}),
        line(1, "train", 1, {"a": facts(-1.0, 2)}),
    ]
    found = outcome.gather(
        name="t", data="d", test_rows=0, labels=1, batch={"pixel_8": 1}, layers=(0, 1), experts=3,
        history=rounds, scores={}, predicted={}, slots={},
    )  # fmt: skip
    assert found.devices[0].before is None
    assert found.devices[0].after is None
    assert found.final_accuracy is None
    assert live.percent(found.final_accuracy) == "-"


def test_history_text_is_checked():
    good = json.dumps(HISTORY[0])
    assert len(history.parse(f"{good}\n{good[:40]}", "h")) == 1  # cut by a crash
    with pytest.raises(HistoryError, match="h:1: not JSON"):
        history.parse(f"{{\n{good}", "h")
    with pytest.raises(HistoryError, match="no line of a history"):
        history.parse("[]\n", "h")


def test_history_without_updates_or_with_a_key_missing_is_refused():
    more = {
        "name": "t", "data": "d", "test_rows": 0, "labels": 1, "batch": {"pixel_8": 1}, "layers": (0, 1),
        "experts": 3, "scores": {}, "predicted": {}, "slots": {},
    }  # fmt: skip
    with pytest.raises(HistoryError, match="no device"):
        outcome.gather(history=[line(0, "profile", 0, {})], **more)
    broken = {k: v for k, v in facts(0.1).items() if k != "rows"}
    with pytest.raises(HistoryError, match="'rows'"):
        outcome.gather(history=[line(0, "profile", 0, {"a": broken})], **more)


def test_report_is_one_file_with_every_number(result, tmp_path):
    page = report.write(result, tmp_path / "out")
    text = page.read_text()
    for wanted in ("25.0%", "75.0%", "90.0%", "1 of 2", "rejected: stale", "no update in time"):
        assert wanted in text
    assert text.count("data:image/png;base64,") == 4
    assert "http" not in text.replace("http-equiv", "")
    for name in ("accuracy", "slots", "experts", "resources"):
        assert (tmp_path / "out" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_report_escapes_what_comes_from_outside(result):
    object.__setattr__(result, "data", "<script>x</script>")
    assert "<script>" not in report.render(result, {})


def test_table_fits_ninety_columns(result, capsys):
    report.print_table(result, Console(width=90))
    text = capsys.readouterr().out
    assert "…" not in text
    assert "30.0%" in text
    assert "global accuracy after: 75.0%" in text
    assert "  a: 1 int8 of rank 4, 1 int4 of rank 4, 1 int4 frozen" in text


def test_figures_bear_slots_that_are_not_known(result):
    from lab import plots

    for device in result.devices:
        object.__setattr__(device, "slots", {})
    assert plots.slots(result)[:4] == b"\x89PNG"


def test_figures_bear_gaps_and_more_layers_than_columns(result):
    from lab import plots

    object.__setattr__(result, "layers", (0, 1, 5))
    for what in ("trained_rounds", "resident_rounds"):
        object.__setattr__(result, what, {name: np.zeros((3, 3), int) for name in ("a", "b")})
    for draw in plots.FIGURES.values():
        assert draw(result)[:4] == b"\x89PNG"


STATUS = {
    "state": "training", "round": 1, "rounds": 5, "version": 0,
    "devices": {
        "a": {
            "profile": "pixel_8", "online": True, "state": "working", "lease": "l", "work": "train",
            "last_seen": 0, "slots": [{"int4/4": 2}, {"int4/0": 1}], "resident": {"0": [0, 2], "1": [1]}, "trained": {},
            "budget_bytes": 5 << 20, "peak_bytes": 6 << 20, "baseline_bytes": 1,
            "bytes_up": 0, "bytes_down": 1_500_000, "accuracy_first": None, "accuracy_last": 0.5,
            "loss_last": 1.25, "rows": 3,
        },
        "b": {
            "profile": "pixel_8", "online": False, "state": "offline", "lease": None, "work": None,
            "last_seen": 0, "slots": [], "resident": {}, "trained": {}, "budget_bytes": None,
            "peak_bytes": None, "baseline_bytes": None, "bytes_up": 0, "bytes_down": 0,
            "accuracy_first": None, "accuracy_last": None, "loss_last": None, "rows": 3,
        },
    },
    "rejected": [], "mean_accuracy": 0.5,
}  # fmt: skip


def test_live_view_says_a_line_only_when_something_changed(capsys):
    with live.View(Console(width=110)) as view:
        view.show(STATUS, {})
        view.show(STATUS, {})
        view.show(STATUS, {0: 0.25})
    assert capsys.readouterr().out.splitlines() == [
        "round 1 of 5, training, adapter 0",
        "round 1 of 5, training, adapter 0, global accuracy 25.0% (adapter 0)",
    ]


def test_live_table_shows_every_device(capsys):
    Console(width=110).print(live.render(STATUS, {}))
    text = capsys.readouterr().out
    assert "2+1" in text
    assert "6.0 / 5.0" in text
    assert "50.0%" in text
    assert "offline" in text


def test_no_status_while_the_server_is_away():
    assert live.fetch_status("http://127.0.0.1:9") is None
