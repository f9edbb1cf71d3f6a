"""Sub-models in slots: what is held trains, every slot is filled, little moves."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.structure import Change, Limits, Rules, State
from server.submodels import after, begin, fits, limits, pin, place, score
from tests.server.fake_device import FACTS
from tests.server.tiny_store import FROZEN, FULL, HALF, WIDE, shape

LARGE = shape(((WIDE, FULL, FROZEN), (WIDE, WIDE, HALF, FROZEN)))
ROOM = Limits(least=(2, 2), most=(2, 3), total=5)


def test_limits_are_the_slots_that_train():
    assert limits(LARGE, 2, 4) == ROOM
    assert limits(shape(((FULL, FROZEN), (FULL,))), 2, 4) == Limits(
        least=(1, 1), most=(1, 1), total=2
    )
    # More slots than experts: the last ones stay empty.
    assert limits(shape(((FULL,) * 6, (FULL,) * 6)), 2, 4).most == (4, 4)


@pytest.mark.parametrize(
    ("head_room", "held"), [(1.0, ((0, 3), (1, 2, 3))), (0.7, ((0, 3), (2, 3))), (0.01, ((0, 3), (2, 3)))]
)  # fmt: skip
def test_a_sub_model_begins_with_the_first_chosen(head_room, held):
    state = begin([[3, 0, 1], [2, 3, 1, 0]], LARGE, ROOM, head_room)
    assert state == State(held=held)
    assert fits(state.held, ROOM)


def test_a_sub_model_that_does_not_fit_another_program():
    assert not fits(((0, 1), (0, 1, 2)), Limits(least=(2, 2), most=(2, 2), total=4))
    assert not fits(((0,), (0, 1)), ROOM)


def test_places_by_hand():
    slots = (FULL, FULL, FULL, FROZEN)
    # 4 keeps its slot, 7 gets the free one; 5 and 6 are company and stay where they were.
    assert place((4, 7), (5, 4, 6, 1), slots, (5, 4, 1, 6)) == [7, 4, 5, 6]
    # Nothing was there: the more valuable one gets the better slot.
    assert place((2, 8), (8, 2, 3), slots, ()) == [8, 2, 3]
    # What was frozen is to be trained: it has to move.
    assert place((6,), (5, 4, 1, 6), slots, (5, 4, 1, 6)) == [6, 4, 1, 5]


@given(st.data())
def test_any_placement_trains_what_is_held_and_fills_all_slots(data):
    kinds = data.draw(st.lists(st.sampled_from([FULL, HALF, FROZEN]), min_size=1, max_size=6))
    experts = list(range(8))
    trains = sum(1 for k in kinds if k.rank)
    chosen = data.draw(st.permutations(experts))[: len(kinds)]
    held = tuple(sorted(data.draw(st.sets(st.sampled_from(experts), max_size=trains))))
    former = data.draw(st.permutations(experts))[: data.draw(st.integers(0, len(kinds)))]
    placed = place(held, chosen, kinds, former)
    assert len(placed) == len(set(placed)) == len(kinds)
    assert all(kinds[placed.index(e)].rank for e in held)
    # Nothing moves when the same is asked for again.
    assert place(held, chosen, kinds, placed) == placed


def test_only_devices_with_a_sub_model_are_pinned():
    chosen = {"a": [[3, 0, 1], [2, 3, 1, 0]], "b": [[3, 0, 1], [2, 3, 1, 0]]}
    shapes = {"a": LARGE, "b": LARGE}
    pinned = pin(chosen, shapes, {"a": State(held=((1, 2), (0, 3)))}, {"a": chosen["a"]})
    assert pinned["b"] == chosen["b"]
    # Layer 0: 1 and 2 train, 3 remains as company; layer 1: 0 must leave the frozen slot.
    assert sorted(pinned["a"][0][:2]) == [1, 2]
    assert pinned["a"][0][2] == 3
    assert set(pinned["a"][1][:3]) > {0, 3}
    assert sorted(pinned["a"][1]) == [0, 1, 2, 3]


def test_scores():
    assert score(FACTS) == 0.5
    assert score(replace(FACTS, accuracy_after=-1.0, loss_after=2.5)) == -2.5
    assert score(replace(FACTS, accuracy_after=0.0)) == 0.0
    assert score(replace(FACTS, held_back_rows=0)) is None


def test_a_round_asks_the_others_as_they_were_before_it():
    p = np.array([[0.4, 0.3, 0.2, 0.1]])
    states = {
        "a": State(held=((0,),), best=0.5, scores=(0.5,), turns=1),
        "b": State(held=((0, 1, 2),), best=0.5, scores=(0.5,), turns=1),
        "c": State(held=((0, 1),)),
    }
    room = {d: Limits(least=(1,), most=(4,), total=4) for d in states}
    new, changes = after(
        {"a": 0.5, "b": 0.5, "x": 0.1}, states, dict.fromkeys("abc", p), room,
        Rules(patience=1, similar=1),
    )  # fmt: skip
    # Each goes by the first of equally similar ones: a by b (3), b by a as it was (1).
    assert changes == {
        "a": Change(kind="grow", added=((0, 1), (0, 2))),
        "b": Change(kind="shrink", removed=((0, 1), (0, 2))),
    }
    assert {d: s.held for d, s in new.items()} == {"a": ((0, 1, 2),), "b": ((0,),)}
    assert after({"a": 0.5}, states, {"b": p}, room, Rules()) == ({}, {})  # nothing known of a
