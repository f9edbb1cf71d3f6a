"""Methods by name: what `--method` sets, what wins over it, and whole runs of the real server by each of them."""

import dataclasses
import json

import numpy as np
import pytest

from protocol.manifest import Slot
from protocol.objective import Objective
from server import config, device_objective
from server.__main__ import main
from server.config import Config
from server.presets import OURS, PRESETS
from server.relevance import RELEVANCE
from server.strategies import FIXED, Fleet, by_prior
from tests.server.test_round_trip import run_all

FLAGS = ["--store", "s", "--state", "t"]


def parsed(*more):
    return config.parse([*FLAGS, *map(str, more)])


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_sets_all_its_settings(name):
    found, preset = parsed("--method", name), PRESETS[name]
    assert (found.method, found.rules, found.objective) == (name, preset.rules, preset.objective)
    for field in ("relevance", "beta", "exploration", "coverage", "strategy", "initial", "reprofile",
                  "structure", "head_room", "active_below", "cap_share", "uplink", "downlink",
                  "gate_rate_factor", "gate_warmup"):  # fmt: skip
        assert getattr(found, field) == getattr(preset, field), field
    assert found.strategy in FIXED
    assert found.relevance in RELEVANCE
    # What is the run's own is not a matter of the method.
    plain = parsed()
    assert (found.steps, found.learning_rate, found.port) == (
        plain.steps, plain.learning_rate, plain.port,
    )  # fmt: skip


def test_ours_is_the_default():
    assert parsed() == parsed("--method", "ours")
    assert parsed() == Config(store=parsed().store, state=parsed().state)
    assert parsed().objective == OURS.objective


def test_flags_that_are_given_win(tmp_path):
    path = tmp_path / "objective.json"
    path.write_text('{"prox": 0.5}')
    found = parsed(
        "--structure", "none", "--beta", 0.3, "--method", "fedmoe", "--gate", "rows", "--no-copy-single",
        "--objective", path, "--uplink", "int4",
    )  # fmt: skip
    assert (found.structure, found.beta, found.gate, found.copy_single) == (
        "none",
        0.3,
        "rows",
        False,
    )
    assert (found.objective, found.uplink) == (Objective(prox=0.5), "int4")
    assert (found.relevance, found.aggregate, found.weighting) == ("frequency", "factors", "rows")
    # Also where the value given is the default of a server without --method.
    assert parsed("--method", "fedmoe", "--relevance", "norm").relevance == "norm"
    assert parsed("--copy-single").copy_single


def test_a_rate_of_the_router_wins_over_the_methods_share():
    assert parsed().gate_rate_factor == 0.3
    assert parsed("--router-learning-rate", 1e-4).gate_rate_factor == 0
    both = parsed("--router-learning-rate", 1e-4, "--gate-rate-factor", 0.5)
    assert both.gate_rate_factor == 0.5


def test_an_unknown_method(capsys):
    assert main([*FLAGS, "--method", "fedmo"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("server: --method 'fedmo' found, one of ours, fedit,")
    assert text.count("\n") == 1


def test_adapter_experts_are_wanted(store, tmp_path, capsys):
    flags = ["--store", str(store[0]), "--state", str(tmp_path / "x"), "--method", "fft-moe"]
    assert main(flags) == 2
    assert "--method fft-moe wants adapter experts" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_help_lists_them(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text and preset.says in text for name, preset in PRESETS.items())


def test_the_scoreboard_compares_what_runs_here():
    methods = pytest.importorskip("benchmarks.federated.methods")
    assert {"fedit", "fedmoe", "hfedmoe-fixed", "flame", "ours"} <= methods.METHODS.keys()
    for name in methods.METHODS.keys() & PRESETS.keys():
        method, preset = methods.METHODS[name], PRESETS[name]
        for field in ("rules", "objective", "relevance", "beta", "coverage", "structure", "uplink"):
            assert getattr(method, field) == getattr(preset, field), (name, field)
    ablations = {m.name: m for m in methods.ABLATIONS}
    for name in ("without-stage-1", "fedmoe-without-stage-1", "fedmoe-without-stage-2"):
        assert ablations[name].profile == (PRESETS[name].initial == "profile")
        assert ablations[name].structure == PRESETS[name].structure
        assert ablations[name].rules == PRESETS[name].rules
    assert methods.METHODS["fedmoe"].reserve == pytest.approx(1 - PRESETS["fedmoe"].head_room)
    fixed = {"ffa", "alternate", "fedsa"}
    assert {PRESETS[n].rules for n in fixed} == {ablations[f"lora-{n}"].rules for n in fixed}


def test_what_goes_by_the_size_of_a_device():
    slots = [[Slot(format="int4", rank=2)] * 3, [Slot(format="int4", rank=2)] * 5]  # 4 on average
    asked = Objective(active=1, cap=1, cap_where="backward")

    def of(**more):
        given = {"experts": 20, "top_k": 1, "active_below": 0.0, "cap_share": 0.0, **more}
        return device_objective.fitted(asked, slots, **given)

    assert of() == asked
    assert of(active_below=0.25).active == 1  # 4 of 20
    assert of(active_below=0.25, experts=16) == dataclasses.replace(asked, active=0)
    assert [of(cap_share=s, top_k=2).cap for s in (0.1, 0.5, 0.8, 1)] == [2, 2, 3, 4]
    plain = device_objective.fitted(
        Objective(), slots, experts=20, top_k=1, active_below=0.0, cap_share=0.5
    )
    assert plain == Objective()  # no cap was asked for


def test_the_bases_own_experts_whatever_devices_measured():
    two = [[Slot(format="int4", rank=2)] * 2]
    fleet = Fleet(
        value={d: np.array([v]) for d, v in {"a": [9.0, 8, 0, 0], "b": [0.0, 0, 8, 9]}.items()},
        slots={"a": two, "b": two},
        top_k=1,
        coverage=0.0,
        seed=0,
        prior=np.array([[0.1, 0.4, 0.2, 0.3]]),
    )
    assert by_prior(fleet) == {"a": [[1, 3]], "b": [[1, 3]]}
    spread = by_prior(dataclasses.replace(fleet, coverage=0.5))
    assert [spread[d][0][0] for d in "ab"] == [1, 1]
    assert spread["a"][0][1] != spread["b"][0][1]
    with pytest.raises(ValueError, match=r"wants Fleet\.prior"):
        by_prior(dataclasses.replace(fleet, prior=None))


def two_rounds(serve, fleet, method):
    server = serve("--broker", "amqtt", "--rounds", "2", "--min-devices", "2", "--method", method)
    devices = [fleet(server.device("a")), fleet(server.device("b", "large"))]
    leases = run_all(devices)
    history = [json.loads(x) for x in (server.state / "history.jsonl").read_text().splitlines()]
    trained = [line for line in history if line["work"] == "train"]
    assert [(line["version"], line["closed_by"]) for line in trained] == [(1, "all"), (2, "all")]
    assert all(len(line["devices"]) == 2 for line in trained)
    return devices, leases, [line["work"] for line in history]


def test_fedmoe_runs(serve, fleet):
    _, leases, works = two_rounds(serve, fleet, "fedmoe")
    assert works == ["profile", "train", "train", "evaluate"]
    first = leases["b"][1]
    assert (first.objective, first.uplink) == (PRESETS["fedmoe"].objective, "float32")
    assert first.router_learning_rate == pytest.approx(0.3 * first.learning_rate)
    # It begins with nine tenths of the slots that train: 1.8 of 2 but top-k are 2, and 2.7 of 3.
    assert [len(first.trained[layer]) for layer in "01"] == [2, 2]
    assert [len(first.resident[layer]) for layer in "01"] == [3, 4]


def test_scaffold_runs(serve, fleet):
    (a, _), leases, works = two_rounds(serve, fleet, "scaffold")
    assert works == ["train", "train", "evaluate"]  # nothing is profiled
    assert leases["a"][0].objective == Objective(scaffold=True)
    assert not any(n.startswith("scaffold.") for n in a.adapters[1])
    assert any(n.startswith("scaffold.") for n in a.adapters[2])
    assert leases["a"][0].resident == leases["a"][1].resident
    for layer in "01":  # the base's favourites: what the smaller holds the larger does
        assert set(leases["a"][0].resident[layer]) < set(leases["b"][0].resident[layer])


@pytest.mark.parametrize(
    "name", ["random", "hfedmoe", "flame", "alternate", "fedsa", "without-stage-1"]
)
def test_the_others_run(serve, fleet, name):
    preset = PRESETS[name]
    _, leases, works = two_rounds(serve, fleet, name)
    assert (works[0] == "profile") == (preset.initial == "profile")
    train = [x for x in leases["b"] if x.work == "train"]
    assert len(train) == 2
    assert {x.uplink for x in train} == {preset.uplink}
    wanted = [
        device_objective.fitted(
            preset.rules.objective(preset.objective, x.round),
            [[None] * 3, [None] * 4],
            experts=4,
            top_k=2,
            active_below=preset.active_below,
            cap_share=preset.cap_share,
        )
        for x in train
    ]
    assert [x.objective for x in train] == wanted
