"""Coverage counts the holders of the whole fleet, not of the round's devices alone."""

import asyncio
import shutil

import pytest

from server.artifacts import Artifacts
from server.config import Config
from server.rounds import OpenRound
from server.store import Store
from server.turns import Turns
from tests.server import tiny_store
from tests.server.tiny_store import FULL

NAMES = ("a", "b", "c")


@pytest.fixture
def opened(tmp_path):
    """(round's devices -> leases) of a run with three registered devices of three slots each."""
    tiny_store.build(tmp_path / "store", {name: ((FULL,) * 3,) * 2 for name in NAMES})
    artifacts = Artifacts(tmp_path / "store")
    config = Config(
        store=tmp_path / "store", state=tmp_path / "state", initial="prior", exploration=0.0
    )
    store = Store(config.state, artifacts.base.base)
    turns = Turns(config, artifacts, store, None, tmp_path / "blobs")
    asyncio.run(turns.write_first_version())
    for name in NAMES:
        store.register(name, name, 10)
    rounds = iter(range(1, 9))

    def turn(*devices, work="train"):
        command = OpenRound(round=next(rounds), work=work, devices=devices)
        return asyncio.run(turns.open(command))

    turn.store, turn.turns = tmp_path / "store", turns
    turn.prior = artifacts.base.routing_prior
    yield turn
    store.close()


def ranked(prior):
    """Experts of each layer by falling value."""
    return {str(i): sorted(range(4), key=lambda e: -row[e]) for i, row in enumerate(prior)}


def test_one_device_a_round_leaves_the_others_their_experts(opened):
    """Two best for everyone; of the third slots one goes to the last expert, because others hold the third best."""
    order = ranked(opened.prior)
    leases = {name: opened(name) for name in NAMES}
    assert [list(found) for found in leases.values()] == [["a"], ["b"], ["c"]]
    held = {name: found[name].resident for name, found in leases.items()}
    for layer, best in order.items():
        assert all(set(h[layer][:2]) == set(best[:2]) for h in held.values())
        thirds = [h[layer][2] for h in held.values()]
        assert sorted(thirds.count(e) for e in best[2:]) == [1, 2], thirds


def test_a_device_without_an_artifact_holds_nothing(opened):
    """What only it held falls to somebody else."""
    order = ranked(opened.prior)
    shutil.rmtree(opened.store / "b")
    opened.turns._artifacts._manifests.clear()
    leases = opened("a", "b", "c")
    assert list(leases) == ["a", "c"]
    for layer, best in order.items():
        assert {leases[name].resident[layer][2] for name in leases} == set(best[2:])


def test_the_last_round_measures_what_was_trained(opened):
    """Who trained keeps all of it, what it held for coverage too; who did not gets the best for itself."""
    order = ranked(opened.prior)
    trained = {name: opened(name)[name].resident for name in ("a", "b")}
    last = opened("a", "b", "c", work="evaluate")
    assert {name: last[name].resident for name in ("a", "b")} == trained
    assert any(trained["a"][layer][2] != trained["b"][layer][2] for layer in order)
    for layer, best in order.items():
        assert set(last["c"].resident[layer]) == set(best[:3])
