from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import device_profiles
from export import catalogue, costs, items, outline, plan
from export.items import CAPS, Values
from export.plan import Choices, DoesNotFit
from protocol.manifest import Shape, Slot

CONFIG = {
    "model_type": "olmoe",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
BASE = outline.of(CONFIG)
DENSE = costs.dense_of(BASE)
PROFILE = replace(
    device_profiles.load("pixel_8"), rank=4, sequence=32, batch=4, gflops=0.1, uplink_mbit=1.0
)
EMPTY = Shape(batch=4, sequence=32, answers=4, dense="int8", slots=())
FIXED = costs.estimate(BASE, DENSE, EMPTY, 1).predicted
LARGEST = items.states(BASE, 4)[-1]
ALL = FIXED + 24 * costs.slot_memory(BASE, LARGEST) * 1.3


def values(seed=0, skew=2.0):
    mass = np.random.default_rng(seed).random((3, 8)) ** skew
    mass = mass / mass.sum(1, keepdims=True)
    return Values(mass, mass)


def made(memory=ALL, known=None, reserve=0, base=BASE, **choices):
    profile = replace(PROFILE, memory_mb=4096, budget_mb=1024)
    options = Choices(scale_budget=memory / 2**30, **choices)
    return plan.choose(base, DENSE, profile, options, known or values(), reserve)


def kept_mass(made_plan, known):
    return [
        float(row[list(ids)].sum()) for row, ids in zip(known.mass, made_plan.experts, strict=True)
    ]


@settings(deadline=None, max_examples=60)
@given(
    st.integers(0, 10**6),
    st.floats(0, 4),
    st.floats(0.2, 1.2),
    st.floats(0.001, 0.2),
    st.floats(0.3, 60),
    st.floats(0, 1),
)
def test_never_over_a_cap_and_floors_hold(seed, skew, memory, uplink, deadline, theta):
    known = values(seed, skew)
    asked = {"uplink_mb": uplink, "deadline": deadline, "theta": theta}
    try:
        found = made(memory * ALL, known, **asked)
    except DoesNotFit:
        return
    assert (found.used <= found.budget.limits).all(), dict(zip(CAPS, found.used, strict=True))
    assert found.theta <= theta
    assert min(kept_mass(found, known)) >= found.theta - 1e-9
    for slots, ids in zip(found.shape.slots, found.experts, strict=True):
        assert len(slots) == len(ids) == len(set(ids)) >= 2
        assert slots[0].rank > 0
    assert made(memory * ALL, known, **asked) == replace(found, budget=ANY_BUDGET)


class _Any:
    def __eq__(self, other):
        return True


ANY_BUDGET = _Any()


def test_everything_fits_with_the_widest_format_and_the_full_rank():
    found = made()
    assert found.shape.slots == ((LARGEST,) * 8,) * 3
    assert found.shape.dense == "int8"
    assert found.theta == 0.6


def test_slots_follow_the_concentration_of_routing():
    mass = np.array([[0.91, *[0.09 / 7] * 7], [1 / 8] * 8, [1 / 8] * 8])
    found = made(FIXED + (ALL - FIXED) * 0.4, Values(mass, mass))
    counts = [len(slots) for slots in found.shape.slots]
    assert counts[0] < counts[1]
    assert found.theta == 0.6


def test_slots_are_ordered_and_filled_by_value():
    known = values(3)
    found = made(FIXED + (ALL - FIXED) * 0.4, known)
    for row, slots, ids in zip(known.mass, found.shape.slots, found.experts, strict=True):
        assert [row[e] for e in ids] == sorted((row[e] for e in ids), reverse=True)
        order = [(-s.rank, s.format == "int4") for s in slots]
        assert order == sorted(order)


def test_devices_with_nearly_the_same_budget_share_a_shape():
    room = 2 ** ((np.floor(np.log2(ALL - FIXED) * 8) - 6) / 8)
    shapes = {made(FIXED + room * (1 + n / 1000)).shape for n in range(1, 85, 7)}
    assert len(shapes) == 1


def test_the_catalogue_is_small():
    rooms = (ALL - FIXED) * np.geomspace(0.3, 0.6, 60)
    assert len({made(FIXED + room).shape for room in rooms}) <= 9 + 1


def test_caps_that_do_not_bind_play_no_part():
    free = made(FIXED + (ALL - FIXED) * 0.4)
    near = made(
        FIXED + (ALL - FIXED) * 0.4,
        uplink_mb=1.2 * free.uplink / 2**20,
        deadline=1.4 * sum(free.seconds.values()),
    )
    assert near.shape == free.shape


def test_a_small_uplink_leaves_experts_frozen():
    free = made()
    tight = made(uplink_mb=free.uplink / 2**20 / 3)
    ranks = [slot.rank for slots in tight.shape.slots for slot in slots]
    assert len(ranks) == 24
    assert ranks.count(0) >= 8
    assert 0 < tight.uplink <= free.uplink / 3


def test_a_short_deadline_halves_the_batch():
    free = made(uplink_mb=1.0)
    compute = sum(free.seconds.values()) - free.seconds["upload"]
    tight = made(uplink_mb=1.0, deadline=compute * 0.7 + free.seconds["upload"])
    assert (free.shape.batch, tight.shape.batch, tight.shape.sequence) == (4, 2, 32)
    with pytest.raises(DoesNotFit, match=r"time: .* s needed"):
        made(batch=4, sequence=32, deadline=compute * 0.2)


def test_dense_is_int4_where_that_saves_the_floor():
    # Room for the floor beside int4 but not beside int8.
    known = values(1, 0.0)
    mass = known.mass
    gap = DENSE.bytes("int8") - DENSE.bytes("int4")
    least = sum(costs.slot_memory(BASE, Slot(format="int4", rank=r)) for r in (2, 0, 0, 0, 0) * 3)
    memory = (FIXED + 1.2 * least + 3 * 4 * 4 * 2 * 64) - 0.9 * gap
    found = made(memory, Values(mass, mass), batch=4, sequence=32)
    assert (found.shape.dense, found.theta) == ("int4", 0.6)
    assert made(memory, Values(mass, mass), theta=0.3).shape.dense == "int8"


def test_theta_gives_way_before_nothing_fits():
    known = values(1, 0.0)
    least = 3 * sum(costs.slot_memory(BASE, Slot(format="int4", rank=r)) for r in (2, 0))
    gap = DENSE.bytes("int8") - DENSE.bytes("int4")
    found = made(FIXED - gap + 1.3 * least, known, batch=4, sequence=32)
    assert 0 < found.theta < 0.6
    assert found.theta * 20 == pytest.approx(round(found.theta * 20))


def test_sequence_is_the_last_to_go():
    profile = replace(PROFILE, sequence=64, batch=2, memory_mb=4096, budget_mb=1024)
    small = replace(EMPTY, batch=1, sequence=32, dense="int4")
    memory = costs.estimate(BASE, DENSE, small, 1).predicted
    memory += 3.5 * sum(costs.slot_memory(BASE, Slot(format="int4", rank=r)) for r in (2, 0))
    found = plan.choose(BASE, DENSE, profile, Choices(scale_budget=memory / 2**30), values())
    assert (found.shape.batch, found.shape.sequence) == (1, 32)
    with pytest.raises(DoesNotFit, match="try a smaller --sequence, --rank"):
        plan.choose(
            BASE, DENSE, profile, Choices(scale_budget=memory / 2**30, sequence=64), values()
        )


def test_what_lowering_has_shown_is_reserved():
    memory = FIXED + (ALL - FIXED) * 0.5
    assert made(memory, reserve=int((ALL - FIXED) * 0.2)).shape != made(memory).shape
    with pytest.raises(DoesNotFit):
        made(memory, reserve=int(memory))


def test_a_selection_is_kept_and_nothing_else():
    known = values()
    selected = np.zeros((3, 8), bool)
    selected[0, [0, 5]] = selected[1, [1, 2, 7]] = selected[2, [3, 4]] = True
    found = made(known=replace(known, selected=selected))
    assert [sorted(ids) for ids in found.experts] == [[0, 5], [1, 2, 7], [3, 4]]


def test_adapter_experts_have_a_width_and_no_format():
    base = replace(BASE, projections=("adapter",), experts={}, error={})
    found = made(base=base, uplink_mb=0.02)
    kinds = {(s.format, s.rank) for slots in found.shape.slots for s in slots}
    assert kinds <= {("none", 4), ("none", 2)}
    assert costs.adapter_floats(base, 4) == 4 * (64 + 64)


def test_states_of_a_base():
    assert [(s.format, s.rank) for s in items.states(BASE, 4)] == [
        *(("int4", 0), ("int4", 2), ("int4", 4)),
        *(("int8", 0), ("int8", 2), ("int8", 4)),
    ]
    assert [s.rank for s in items.states(BASE, 1)] == [0, 1, 0, 1]


def test_costs_of_a_slot_by_hand():
    # gate_up [64, 64] and down [64, 32]: 6144 weights, a scale for every 32.
    slot = Slot(format="int4", rank=2)
    assert costs.frozen_bytes(BASE, "int4") == 6144 // 2 + 2 * 6144 // 32
    assert costs.frozen_bytes(BASE, "int8") == 6144 + 2 * 6144 // 32
    assert costs.adapter_floats(BASE, 2) == 2 * (64 + 64 + 64 + 32)
    assert costs.slot_uplink(BASE, slot) == 4 * (448 + 64)
    assert costs.slot_uplink(BASE, Slot(format="int4", rank=0)) == 0


def test_dense_bytes_by_hand():
    # Tied embedding [300, 64]; per layer q, k, v, o [64, 64] and norms, which stay float32.
    matrices = 300 * 64 + 3 * 4 * 64 * 64
    norms = sum(s[0] for s in DENSE.shapes.values() if len(s) == 1)
    assert DENSE.bytes("int8") == matrices + 2 * matrices // 32 + 4 * norms
    assert (DENSE.linear, DENSE.head) == (3 * 4 * 64 * 64, 300 * 64)
    # Layers 1 and 2: queries and keys twice, because of their norms, values and the output.
    assert DENSE.kept == 2 * (2 * 2 + 1 + 1) * 64


@given(st.floats(1, 1e12))
def test_rounding_never_raises_and_loses_at_most_a_step(room):
    rounded = catalogue.round_down(room)
    assert rounded <= room * (1 + 1e-8)
    assert rounded >= room / 2 ** (1 / 8) * (1 - 1e-8)
    assert catalogue.round_down(rounded) == pytest.approx(rounded)
