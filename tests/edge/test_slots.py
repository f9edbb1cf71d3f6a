import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge import slots
from protocol import names, packing, tensors
from protocol.manifest import Slot, TensorSpec

RESIDENT = {0: (5, 0, 3, 2), 1: (4, 1, 2)}


def slot(format, rank):
    return Slot(format=format, rank=rank)


def flat_arrays(base, shape):
    """The flat arrays of a program, their elements numbered."""
    arrays = {}
    for layer, kinds in zip(base.moe_layers, shape.slots, strict=True):
        rank = sum(kind.rank for kind in kinds)
        for projection in base.projections:
            out, features = base.features(projection)
            for letter, size in (("a", features), ("b", out)):
                count = np.arange(rank * size, dtype=np.float32)
                arrays[f"layers.{layer}.{projection}.{letter}"] = count
        rows = np.arange(len(kinds) * base.hidden, dtype=np.float32)
        arrays[f"layers.{layer}.router"] = rows.reshape(len(kinds), base.hidden)
        arrays[f"layers.{layer}.output_scale"] = np.ones(1, np.float32)
    return arrays


def zeros(shapes):
    return {name: np.zeros(size, np.float32) for name, size in shapes.items()}


def test_views_are_the_slots_parts_of_the_flat_arrays(artifact):
    base, shape = artifact.base, artifact.manifest.shape
    arrays = flat_arrays(base, shape)
    seen = slots.views(arrays, base, shape, RESIDENT)
    scales = {names.output_scale(layer): (1,) for layer in RESIDENT}  # no part of an adapter
    wanted = slots.adapter_shapes(base, shape, RESIDENT) | scales
    assert {n: v.shape for n, v in seen.items()} == wanted
    # Ranks of layer 0 are 4, 4, 2, 0: expert 3 sits in the third slot, after 8 rows of 64 (down's input).
    down = seen["layers.0.experts.3.down.lora_A"]
    assert down.shape == (2, 64)
    assert down[0, 0] == 8 * 64
    # Columns of B: expert 3's part of gate_up starts after 8 * 128 numbers and is laid out [out, rank].
    up = seen["layers.0.experts.3.gate_up.lora_B"]
    assert up.shape == (128, 2)
    assert up[1].tolist() == [8 * 128 + 2, 8 * 128 + 3]
    assert seen["layers.0.router.3"][0] == 2 * 32
    down[1, 5] = -1
    assert arrays["layers.0.down.a"][9 * 64 + 5] == -1


def test_a_frozen_slot_has_a_router_row_and_nothing_else(artifact):
    base, shape = artifact.base, artifact.manifest.shape
    wanted = slots.adapter_shapes(base, shape, RESIDENT)
    assert [n for n in wanted if names.parse(n).expert == 2] == [
        "layers.0.router.2",
        "layers.1.router.2",
    ]
    assert wanted["layers.1.experts.1.gate_up.lora_A"] == (2, 32)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4).filter(any), st.randoms())
def test_every_number_of_the_flat_arrays_has_one_owner(artifact, ranks, random):
    base = artifact.base
    shape = artifact.manifest.shape
    kinds = tuple(slot("int4", r) for r in ranks)
    shape = type(shape)(batch=1, sequence=1, answers=1, dense="int8", slots=(kinds, kinds))
    ids = tuple(random.sample(range(6), len(ranks)))
    resident = dict.fromkeys(base.moe_layers, ids)
    arrays = {name: np.zeros_like(v) for name, v in flat_arrays(base, shape).items()}
    for view in slots.views(arrays, base, shape, resident).values():
        view += 1
    assert all((value == 1).all() for value in arrays.values())


def test_the_adapter_as_it_came(artifact):
    wanted = slots.adapter_shapes(artifact.base, artifact.manifest.shape, RESIDENT)
    assert slots.check_adapter(zeros(wanted), wanted).keys() == wanted.keys()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.pop("layers.0.router.3"), "'layers.0.router.3' is missing"),
        (lambda a: a.update({"layers.1.router.0": a["layers.0.router.3"]}), "not resident"),
        (lambda a: a.update({"layers.0.router.3": np.zeros(3, np.float32)}), "float32"),
        (lambda a: a.update({"layers.0.router.3": np.full(32, np.nan, np.float32)}), "finite"),
        (lambda a: a.update({"layers.0.router.3": np.zeros(32)}), "float64"),
        # The rank of its slot, not the largest one.
        (
            lambda a: a.update({"layers.0.experts.3.down.lora_A": np.zeros((4, 64), np.float32)}),
            r"float32 \(4, 64\), float32 \(2, 64\) wanted",
        ),
    ],
)
def test_a_wrong_adapter_is_refused(artifact, change, words):
    wanted = slots.adapter_shapes(artifact.base, artifact.manifest.shape, RESIDENT)
    adapter = zeros(wanted)
    change(adapter)
    with pytest.raises(slots.SlotError, match=words):
        slots.check_adapter(adapter, wanted)


@pytest.mark.parametrize(
    ("held", "words"),
    [
        ({"0": (1, 2)}, "layer 0, 3 slots"),
        ({"0": (1, 1, 2)}, "2 experts for layer 0"),
        ({"0": (1, 2, 9)}, "expert 9"),
        ({"0": (0, 1, -2)}, "expert -2"),
        ({"0": (0, 1, 2), "7": (1,)}, "no MoE layer"),
        ({}, "0 experts"),
    ],
)
def test_a_selection_that_does_not_fit_is_refused(held, words):
    with pytest.raises(slots.SlotError, match=words):
        slots.resident_of(held, (0,), ((slot("int4", 2),) * 3,), 8)


@given(st.permutations(range(6)), st.sets(st.integers(0, 5)))
def test_trained_is_a_subset_in_slot_order(order, wanted):
    kinds = ((slot("int4", 4), slot("int4", 2), slot("int4", 2), slot("int8", 0)),)
    resident = {0: tuple(order[:4])}
    able = set(order[:3])  # the last slot has no rank
    inside = wanted & able
    trained = slots.trained_of({"0": tuple(inside)}, resident, kinds)
    assert trained[0] == tuple(e for e in order[:3] if e in inside)
    if strangers := wanted - able:
        with pytest.raises(slots.SlotError, match=f"expert {min(strangers)} of layer 0"):
            slots.trained_of({"0": tuple(wanted)}, resident, kinds)


def test_names_of_some_experts():
    known = dict.fromkeys(("layers.0.router.3", "layers.0.experts.1.down.lora_A", "strange"))
    assert slots.names_of({0: (1,)}, known) == ["layers.0.experts.1.down.lora_A"]


def test_experts_are_laid_in_slot_order_in_their_formats(artifact):
    base, shape = artifact.base, artifact.manifest.shape
    read = lambda blob: tensors.mapped(artifact.path(blob))  # noqa: E731
    laid = slots.expert_inputs(base, shape, RESIDENT, read)
    out, features = base.features("gate_up")
    at = out * features + out * features // 2  # int8, then int4
    third = read(base.experts["nf4"][0][3])
    size = packing.packed_bytes("nf4", out, features)
    packed = laid["layers.0.gate_up.packed"]
    np.testing.assert_array_equal(packed[at : at + size], third["gate_up.packed"].reshape(-1))
    assert packed.size == at + size + out * features // 2
    groups = out * features // 32
    np.testing.assert_array_equal(
        laid["layers.0.gate_up.scale"][2 * groups : 3 * groups], third["gate_up.scale"].reshape(-1)
    )


def test_a_swapped_blob_is_named(artifact):
    def read(blob):
        return {"gate_up.packed": np.zeros((2, 2), np.uint8)}

    with pytest.raises(slots.SlotError, match=r"expert 5\): gate_up.packed is uint8 \(2, 2\)"):
        slots.expert_inputs(artifact.base, artifact.manifest.shape, RESIDENT, read)


def test_a_format_that_the_base_does_not_have(artifact):
    import dataclasses

    shape = artifact.manifest.shape
    bare = dataclasses.replace(artifact.base, experts={"int4": artifact.base.experts["int4"]})
    with pytest.raises(slots.SlotError, match="no experts in format 'int8'"):
        slots.blobs_of(bare, shape, RESIDENT)


def test_router_rows_follow_the_residents():
    dense = {
        "layers.0.router": np.arange(8, dtype=np.float32).reshape(4, 2),
        "layers.0.router.bias": np.arange(4, dtype=np.float32),
    }
    arrays = slots.router_inputs(dense, {0: (3, 1)})
    assert arrays["layers.0.router_rows"].tolist() == [[6, 7], [2, 3]]
    assert arrays["layers.0.router_rows.bias"].tolist() == [3, 1]
    assert arrays["layers.0.router_all"].shape == (4, 2)
    with pytest.raises(slots.SlotError, match=r"layers\.1\.router is missing"):
        slots.router_inputs(dense, {1: (0,)})


def test_inputs_are_checked_against_the_program():
    spec = TensorSpec(name="x", shape=(2,), dtype="float32")
    with pytest.raises(slots.SlotError, match="x is not known"):
        slots.check_inputs({}, [spec], "program")
    with pytest.raises(slots.SlotError, match="float64"):
        slots.check_inputs({"x": np.zeros(2)}, [spec], "program")
    flat = TensorSpec(name="w.packed", shape=(4,), dtype="uint8")
    given = slots.check_inputs({"w.packed": np.zeros((2, 2), np.uint8)}, [flat], "program")
    assert given["w.packed"].shape == (4,)


def test_the_full_router_follows_the_residents_only():
    full = np.zeros((4, 2), np.float32)
    moved = slots.with_deltas(full, np.array([[1, 1], [2, 2]], np.float32), (3, 0))
    assert moved.tolist() == [[2, 2], [0, 0], [0, 0], [1, 1]]
    assert not full.any()
