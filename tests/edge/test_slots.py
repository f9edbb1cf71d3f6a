import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import slots
from protocol import names
from protocol.manifest import TensorSpec

RESIDENT = {0: (5, 0, 3, 2), 1: (4, 1, 2)}


def adapter_for(base, shape, resident):
    rng = np.random.default_rng(0)
    adapter = {}
    for name in slots.adapter_names(resident):
        parsed = names.parse(name)
        if parsed.projection is None:
            size = (base.hidden,)
        else:
            out, features = base.features(parsed.projection)
            size = (shape.rank, features) if parsed.factor == "lora_A" else (out, shape.rank)
        adapter[name] = rng.normal(size=size).astype(np.float32)
    return adapter


def test_slot_arrays_hold_transposes_in_slot_order(artifact):
    base, shape = artifact.base, artifact.manifest.shape
    adapter = adapter_for(base, shape, RESIDENT)
    arrays = slots.slot_arrays(adapter, RESIDENT, base, shape)
    assert {n: v.shape for n, v in arrays.items()} == slots.parameter_shapes(base, shape)
    np.testing.assert_array_equal(
        arrays["layers.0.down.a"][1], adapter["layers.0.experts.0.down.lora_A"].T
    )
    np.testing.assert_array_equal(
        arrays["layers.1.gate_up.b"][0], adapter["layers.1.experts.4.gate_up.lora_B"].T
    )
    np.testing.assert_array_equal(arrays["layers.0.router"][3], adapter["layers.0.router.2"])


def test_global_tensors_bring_back_exactly_the_trained_experts(artifact):
    base, shape = artifact.base, artifact.manifest.shape
    adapter = adapter_for(base, shape, RESIDENT)
    arrays = slots.slot_arrays(adapter, RESIDENT, base, shape)
    trained = {0: (5, 2), 1: ()}
    back = slots.global_tensors(arrays, RESIDENT, trained)
    assert set(back) == set(slots.adapter_names(trained))
    for name, value in back.items():
        np.testing.assert_array_equal(value, adapter[name])
        assert value.flags.c_contiguous or value.ndim == 2
        assert not np.shares_memory(value, arrays["layers.0.down.a"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("layers.0.router.3"), "'layers.0.router.3' is missing"),
        (lambda a: a.update({"layers.1.router.0": a["layers.0.router.3"]}), "not resident"),
        (lambda a: a.update({"layers.0.router.3": np.zeros(3, np.float32)}), "float32"),
        (lambda a: a.update({"layers.0.router.3": np.full(32, np.nan, np.float32)}), "finite"),
        (lambda a: a.update({"layers.0.router.3": np.zeros(32)}), "float64"),
    ],
)
def test_a_wrong_adapter_is_refused(artifact, change, words):
    base, shape = artifact.base, artifact.manifest.shape
    adapter = adapter_for(base, shape, RESIDENT)
    change(adapter)
    with pytest.raises(slots.SlotError, match=words):
        slots.slot_arrays(adapter, RESIDENT, base, shape)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"0": (1, 2)}, "layer 0, 3 slots"),
        ({"0": (1, 1, 2)}, "2 experts for layer 0"),
        ({"0": (1, 2, 9)}, "expert 9"),
        ({"0": (0, 1, 2), "7": (1,)}, "no MoE layer"),
        ({}, "0 experts"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(held, words):
    with pytest.raises(slots.SlotError, match=words):
        slots.resident_of(held, (0,), (3,), 8)


@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_trained_is_a_subset_in_slot_order(order, wanted):
    resident = {0: tuple(order[:4])}
    inside = wanted & set(order[:4])
    trained = slots.trained_of({"0": tuple(inside)}, resident)
    assert set(trained[0]) == inside
    assert [order.index(e) for e in trained[0]] == sorted(order.index(e) for e in trained[0])
    frozen = slots.frozen_slots(resident, trained)[0]
    assert {resident[0][s] for s in frozen} == set(order[:4]) - inside
    if strangers := wanted - set(order[:4]):
        with pytest.raises(slots.SlotError, match=str(min(strangers))):
            slots.trained_of({"0": tuple(wanted)}, resident)


def test_experts_are_stacked_in_slot_order(artifact):
    from safetensors.numpy import load_file

    base = artifact.base
    stacked = slots.expert_inputs(base, RESIDENT, lambda b: load_file(artifact.path(b)))
    third = load_file(artifact.path(base.experts[0][3]))
    out = base.features("gate_up")[0]
    np.testing.assert_array_equal(
        stacked["layers.0.gate_up.packed"][2 * out : 3 * out], third["gate_up.packed"]
    )
    assert stacked["layers.0.gate_up.scale"].dtype == np.float32


def test_a_swapped_blob_is_named(artifact):
    def read(blob):
        return {"gate_up.packed": np.zeros((2, 2), np.uint8)}

    with pytest.raises(slots.SlotError, match=r"layer 0, expert 5\): gate_up.packed is \(2, 2\)"):
        slots.expert_inputs(artifact.base, RESIDENT, read)


def test_inputs_are_checked_against_the_program():
    spec = TensorSpec(name="x", shape=(2,), dtype="float32")
    with pytest.raises(slots.SlotError, match="x is not known"):
        slots.check_inputs({}, [spec], "program")
    with pytest.raises(slots.SlotError, match="float64"):
        slots.check_inputs({"x": np.zeros(2)}, [spec], "program")


def test_the_full_router_follows_the_residents_only():
    full = np.zeros((4, 2), np.float32)
    moved = slots.with_deltas(full, np.array([[1, 1], [2, 2]], np.float32), (3, 0))
    assert moved.tolist() == [[2, 2], [0, 0], [0, 0], [1, 1]]
    assert not full.any()
