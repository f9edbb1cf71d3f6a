"""Both stages of FedMoE with a real server process: changes within the slots, restarts, runs without a stage."""

import json
import sqlite3

import numpy as np
import pytest

from server.prediction import complete
from tests.server.test_faults import history, wait_for
from tests.server.test_round_trip import run_all


def turn(round, *devices, **facts):
    """One round with everyone; device -> lease."""
    for device in devices:
        device.ready()
    leases = {}
    for device in devices:
        lease = device.lease()
        while lease.round != round:  # one that was sent twice
            lease = device.lease()
        device.adapters[round] = device.fetch_adapter(lease)
        device.check_adapter(lease)
        leases[device.device] = lease
    for device in devices:
        lease = leases[device.device]
        assert device.deliver(lease, device.made_up_update(lease, **facts)).accepted
    return leases


def experts(device):
    return json.loads(device.get("/v1/experts"))


def test_a_plateau_shrinks_a_restart_forgets_nothing_and_no_gain_undoes_it(serve, fleet):
    server = serve(
        "--rounds", "4", "--min-devices", "3", "--min-updates", "3", "--structure", "freeze", "--patience", "1",
        "--similar", "2", "--head-room", "1",
    )  # fmt: skip
    kinds = {"a": "small", "b": "small", "c": "large"}
    devices = [fleet(server.device(name, kind)) for name, kind in kinds.items()]
    turn(0, *devices)
    first = turn(1, *devices)["c"]
    assert [len(first.trained[i]) for i in "01"] == [2, 3]
    second = turn(2, *devices)["c"]  # 0.5 again: no improvement for one turn
    assert second.trained == first.trained
    wait_for(lambda: len(history(server)) == 3)
    before = experts(devices[0])
    c = before["devices"]["c"]
    assert [len(ids) for ids in c["structure"]["held"]] == [2, 2]
    assert c["structure"]["before"] == [sorted(first.trained[i]) for i in "01"]
    assert (before["version"], c["version"]) == (2, 1)
    # What others or it itself trained in round 2 is newer than what it holds.
    assert all(set(c["stale"][i]) <= set(c["resident"][i]) for i in "01")
    assert all(set(c["stale"][i]) >= set(second.trained[i]) for i in "01")
    assert any(c["stale"].values())
    server.kill()
    server.start()
    for device in devices:
        device.url = server.url
    assert experts(devices[0]) == before
    third = turn(3, *devices)["c"]
    # One expert less to train; all slots filled, and it is sent for as many experts as it trains.
    assert [len(third.resident[i]) for i in "01"] == [3, 4]
    assert [sorted(third.trained[i]) for i in "01"] == c["structure"]["held"]
    assert [set(first.trained[i]) > set(third.trained[i]) for i in "01"] == [False, True]
    fourth = turn(4, *devices)["c"]
    assert {i: set(ids) for i, ids in fourth.trained.items()} == {
        i: set(ids) for i, ids in first.trained.items()
    }
    run_all(devices)
    changes = [{d: s["kind"] for d, s in h["structure"].items()} for h in history(server)]
    assert changes == [{}, {}, {"c": "shrink"}, {"c": "revert"}, {}, {}]
    last = experts(devices[0])["devices"]
    assert last["c"]["structure"]["frozen"]
    assert not last["a"]["structure"]["frozen"]
    assert len(server.wait_line(r"device=c structure: revert, 5 experts, \+1 -0, score 0\.500"))


def test_a_growing_sub_model_takes_free_slots(serve, fleet):
    server = serve(
        "--rounds", "3", "--min-devices", "2", "--min-updates", "2", "--structure", "retry", "--patience", "1",
        "--head-room", "0.5", "--coverage", "0",
    )  # fmt: skip
    # Two large ones; one of them is told to hold more than the other.
    a, b = (
        fleet(server.device("a", "large")),
        fleet(server.device("b", "large")),
    )
    turn(0, a, b)
    leases = turn(1, a, b)
    assert [len(leases["a"].trained[i]) for i in "01"] == [2, 2]
    assert [len(leases["a"].resident[i]) for i in "01"] == [3, 4]
    wait_for(lambda: len(history(server)) == 2)
    server.kill()
    with sqlite3.connect(server.state / "state.sqlite") as db:
        (text,) = db.execute("SELECT state FROM structures WHERE device = 'b'").fetchone()
        state = json.loads(text)
        free = next(e for e in range(4) if e not in state["held"][1])
        state["held"][1] = sorted([*state["held"][1], free])
        db.execute("UPDATE structures SET state = ? WHERE device = 'b'", (json.dumps(state),))
    server.start()
    a.url = b.url = server.url
    turn(2, a, b)
    wait_for(lambda: len(history(server)) == 3)
    assert {d: s["kind"] for d, s in history(server)[2]["structure"].items()} == {
        "a": "grow", "b": "shrink",
    }  # fmt: skip
    third = turn(3, a, b, accuracy_after=0.75)["a"]
    assert [len(third.trained[i]) for i in "01"] == [2, 3]
    wait_for(lambda: len(history(server)) == 4)
    assert {s["kind"] for s in history(server)[3]["structure"].values()} == {"keep"}


def test_a_sub_model_that_cannot_be_read_stops_the_server_in_one_line(serve, store, tmp_path):
    server = serve("--structure", "freeze")
    server.kill()
    with sqlite3.connect(server.state / "state.sqlite") as db:
        db.execute("INSERT INTO structures VALUES ('a', '{\"held\": [[9], [0]]}')")
    with pytest.raises(
        AssertionError, match="server: .*device a: structure: experts \\[9\\] found"
    ):
        server.start()


@pytest.mark.parametrize("initial", ["prior", "random"])
def test_without_stage_one_training_comes_first(serve, fleet, initial):
    server = serve(
        "--rounds", "2", "--min-devices", "2", "--initial", initial, "--reprofile", "1",
        "--exploration", "0", "--coverage", "0",
    )  # fmt: skip
    devices = [fleet(server.device("a")), fleet(server.device("b"))]
    leases = run_all(devices)
    assert [x.work for x in leases["a"]] == ["train", "train", "evaluate"]
    if initial == "prior":
        prior = np.array(server.base.routing_prior)
        best = {str(i): set(np.argsort(-row)[:2]) for i, row in enumerate(prior)}
        for mine in leases.values():
            assert {i: set(ids) for i, ids in mine[0].resident.items()} == best
    assert history(server)[0]["round"] == 1


def test_profiling_comes_again(serve, fleet):
    server = serve("--rounds", "3", "--min-devices", "1", "--reprofile", "2")
    device = fleet(server.device("a"))
    leases = run_all([device])["a"]
    assert [x.work for x in leases] == ["profile", "train", "train", "profile", "train", "evaluate"]
    status = json.loads(device.get("/v1/run"))
    assert (status["round"], status["rounds"], status["version"]) == (5, 4, 3)


def test_who_never_reported_gets_what_its_peers_tell():
    prior = np.full((1, 4), 0.25)
    known = {"a": np.array([[0.7, 0.1, 0.1, 0.1]]), "b": np.array([[0.1, 0.7, 0.1, 0.1]])}
    rows = {"a": 30, "b": 10, "c": 99}
    found = complete(known, ["b", "c"], rows, prior, initial="profile", seed=0)
    np.testing.assert_allclose(found["c"], [[0.55, 0.25, 0.1, 0.1]])
    assert found["b"] is known["b"]
    assert (
        complete({}, ["c"], rows, prior, initial="profile", seed=0)["c"].tolist() == prior.tolist()
    )
    assert (
        complete(known, ["c"], rows, prior, initial="prior", seed=0)["c"].tolist() == prior.tolist()
    )
    drawn = [
        complete(known, [d], rows, prior, initial="random", seed=0)[d] for d in ("c", "c", "d")
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.allclose(drawn[0], drawn[2])
