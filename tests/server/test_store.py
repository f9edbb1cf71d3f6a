import numpy as np
import pytest

from protocol import tensors
from protocol.manifest import Blob
from protocol.messages import Lease
from server.adapters import (
    fresh,
    map_tensors,
    ranks,
    read_version,
    slice_for,
    write_blob,
    write_version,
)
from server.store import StateError, Store
from server.structure import State, from_json, to_json
from tests.server.fake_device import FACTS
from tests.server.tiny_store import FROZEN, FULL, HALF, WIDE, base_index, shape


def lease(device, round=1):
    return Lease(
        lease=f"r-{round}-{device}-1", run="r", round=round, attempt=1, work="train", base_version=0,
        resident={"0": (1,)}, trained={"0": (1,)}, adapter=Blob(sha256="0" * 64, bytes=1), steps=1,
        learning_rate=1.0, router_learning_rate=1.0, seed=0, seconds=1.0, nonce="n",
    )  # fmt: skip


def test_everything_is_there_after_a_reopening(tmp_path):
    store = Store(tmp_path, "base")
    run = store.run
    token = store.register("a", "p", 5)
    assert store.register("a", "q", 6) == token
    store.open_round(1, [("a", lease("a")), ("b", lease("b"))])
    store.accept("r-1-a-1", 99, 12.0, FACTS)
    store.reject(1, "b", "NaN", "r-1-b-1")
    store.close()

    store = Store(tmp_path, "base")
    assert (store.run, store.number("round"), store.get("phase")) == (run, 1, "open")
    assert (store.devices()["a"].profile, store.devices()["a"].rows) == ("q", 6)
    rows = store.leases(1)
    assert {d: (r.state, r.bytes, r.reason) for d, r in rows.items()} == {
        "a": ("accepted", 99, ""), "b": ("rejected", 0, "NaN"),
    }  # fmt: skip
    assert rows["a"].facts == FACTS
    assert rows["a"].lease == lease("a")
    assert store.rejections() == store.rejections(1) == [{"device": "b", "reason": "NaN"}]
    assert store.trained_mass() is None
    value, counts, mass = np.ones((1, 2)), np.full((1, 2), 3), np.full((1, 2), 0.5)
    store.close_round(1, 4, "{}", {"a": value}, counts, mass, over=False)
    assert (store.number("round"), store.number("version"), store.get("phase")) == (2, 4, "waiting")
    np.testing.assert_array_equal(store.values()["a"], np.ones((1, 2)))
    np.testing.assert_array_equal(store.trained_counts(), [[3, 3]])
    np.testing.assert_array_equal(store.trained_mass(), [[0.5, 0.5]])
    store.close()


def test_sub_models_activations_and_versions_are_there_after_a_reopening(tmp_path):
    store = Store(tmp_path, "base")
    assert (store.structures(), store.activations(), store.expert_versions()) == ({}, {}, None)
    state = State(held=((1,),), scores=(0.5,), best=0.5, turns=1, resting={"+0.1": 3})
    store.open_round(1, [("a", lease("a"))], {"a": to_json(State(held=((1,),)))})
    store.close()

    store = Store(tmp_path, "base")
    assert from_json(store.structures()["a"], 1, 2) == State(held=((1,),))
    counts = np.array([[0, 1]])
    store.close_round(
        1, 1, "{}", {}, counts, 0.5 * counts, over=False, activations={"a": np.array([[0.25, 0.75]])},
        expert_versions=counts, structures={"a": to_json(state)},
    )  # fmt: skip
    store.close()

    store = Store(tmp_path, "base")
    assert from_json(store.structures()["a"], 1, 2) == state
    np.testing.assert_array_equal(store.activations()["a"], [[0.25, 0.75]])
    np.testing.assert_array_equal(store.expert_versions(), [[0, 1]])
    store.close()


def test_a_round_that_fails_to_open_begins_no_sub_model(tmp_path):
    store = Store(tmp_path, "base")
    store.open_round(1, [("a", lease("a"))])
    with pytest.raises(Exception, match="UNIQUE"):
        store.open_round(2, [("a", lease("a"))], {"a": "{}"})
    assert store.structures() == {}
    store.close()


def test_an_accepted_update_stays_accepted(tmp_path):
    store = Store(tmp_path, "base")
    store.open_round(1, [("a", lease("a"))])
    store.accept("r-1-a-1", 1, 1.0, FACTS)
    store.reject(1, "a", "late", "r-1-a-1")
    store.accept("r-1-a-1", 2, 2.0, FACTS)
    assert (store.leases(1)["a"].state, store.leases(1)["a"].bytes) == ("accepted", 1)
    store.close()


def test_a_failed_transaction_leaves_nothing(tmp_path):
    store = Store(tmp_path, "base")
    store.open_round(1, [("a", lease("a"))])
    with pytest.raises(Exception, match="UNIQUE"):
        store.open_round(2, [("b", lease("b", 2)), ("a", lease("a"))])
    assert (store.number("round"), store.leases(2)) == (1, {})
    store.close()


def test_the_state_of_another_base_is_refused(tmp_path):
    Store(tmp_path, "base").close()
    with pytest.raises(StateError, match="state of base base, the store has other"):
        Store(tmp_path, "other")


def test_what_is_not_a_database_is_refused(tmp_path):
    (tmp_path / "state.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(StateError, match="file is not a database"):
        Store(tmp_path, "base")


def test_versions_and_slices(tmp_path):
    adapter = {f"layers.0.experts.{e}.{p}.{f}": np.full((2, 3), e, np.float32)
               for e in (0, 1) for p in ("gate_up", "down") for f in ("lora_A", "lora_B")}  # fmt: skip
    adapter |= {f"layers.0.router.{e}": np.full(3, e, np.float32) for e in (0, 1)}
    write_version(tmp_path, 3, adapter, {"x.txt": b"x"})
    write_version(tmp_path, 3, adapter, {})  # the remains of a round that was not committed
    assert not (tmp_path / "3" / "x.txt").exists()
    read = read_version(tmp_path, 3)
    assert all(np.array_equal(read[k], adapter[k]) for k in adapter)
    assert not read["layers.0.router.1"].flags.writeable
    blob = write_blob(tmp_path / "blobs", slice_for(read, {(0, 1): 2}, base_index()))
    part = map_tensors(tmp_path / "blobs" / blob.sha256)
    assert len(part) == 5
    assert set(part) == {k for k in adapter if ".1" in k}


def test_a_slot_gets_the_first_rows_and_columns_of_its_rank():
    base = base_index()
    rng = np.random.default_rng(0)
    adapter = {k: rng.normal(size=v.shape).astype(np.float32) for k, v in fresh(base, 4).items()}
    part = tensors.decode(slice_for(adapter, {(0, 3): 2, (1, 0): 0}, base))
    key = "layers.0.experts.3.down.lora_"
    np.testing.assert_array_equal(part[key + "A"], adapter[key + "A"][:2])
    np.testing.assert_array_equal(part[key + "B"], adapter[key + "B"][:, :2])
    # A frozen expert has its router row only.
    assert [k for k in part if k.startswith("layers.1")] == ["layers.1.router.0"]
    assert len(part) == 2 * 2 + 1 + 1


def test_ranks_follow_the_order_of_the_residents():
    base, of = base_index(), shape(((WIDE, HALF, FROZEN), (FULL, FULL)))
    found = ranks({"0": (3, 1, 0), "1": (2,)}, of, base)
    assert found == {(0, 3): 2, (0, 1): 1, (0, 0): 0, (1, 2): 2}
    with pytest.raises(ValueError, match="4 experts in 3 slots of layer 0"):
        ranks({"0": (3, 1, 0, 2)}, of, base)


def test_the_last_lease_of_each_device(tmp_path):
    store = Store(tmp_path, "base")
    store.open_round(1, [("a", lease("a")), ("b", lease("b"))])
    store.open_round(2, [("b", lease("b", 2))])
    assert {d: x.round for d, x in store.last_leases().items()} == {"a": 1, "b": 2}
    store.close()


def test_two_servers_cannot_share_a_state(tmp_path):
    store = Store(tmp_path, "base")
    with pytest.raises(StateError, match="another server is using this state"):
        Store(tmp_path, "base")
    store.close()
    Store(tmp_path, "base").close()
