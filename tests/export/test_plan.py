import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from export import plan


def prior(rows):
    mass = np.asarray(rows, dtype=np.float64)
    return mass / mass.sum(1, keepdims=True)


def test_slots_follow_the_concentration_of_routing():
    mass = prior([[97, 1, 1, 1], [1, 1, 1, 1]])
    assert plan.slots_for(0.9, mass, 1) == (1, 4)
    assert plan.slots_for(0.9, mass, 2) == (2, 4)


def test_no_other_step_of_the_catalogue_holds_more():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mass = prior(rng.random((3, 8)) ** 3)
        budget = int(rng.integers(6, 25))
        found = plan.choose_slots(mass, 2, lambda s, b=budget: sum(s) <= b)
        steps = [plan.slots_for(n / plan.STEPS, mass, 2) for n in range(plan.STEPS + 1)]
        assert sum(found) == max(sum(s) for s in steps if sum(s) <= budget)


def test_devices_of_nearly_the_same_budget_share_a_shape():
    mass = prior(np.random.default_rng(1).random((4, 16)))
    shapes = {plan.choose_slots(mass, 2, lambda s, b=b: sum(s) <= b) for b in range(30, 36)}
    assert len(shapes) <= 3


@given(
    st.lists(st.lists(st.floats(0.01, 1), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(2, 20),
)
def test_slots_never_exceed_the_budget(rows, budget):
    mass = prior(rows)
    if budget < 2 * len(rows):
        with pytest.raises(plan.DoesNotFit):
            plan.choose_slots(mass, 2, lambda s: sum(s) <= budget)
        return
    slots = plan.choose_slots(mass, 2, lambda s: sum(s) <= budget)
    assert sum(slots) <= budget
    assert all(2 <= n <= 5 for n in slots)


def test_experts_with_the_most_mass_fill_the_slots():
    assert plan.choose_experts(prior([[1, 5, 3, 1], [4, 1, 1, 1]]), (2, 1)) == [(1, 2), (0,)]


def test_stepping_down_goes_through_the_catalogue_and_ends():
    mass = prior([[4, 3, 2, 1], [1, 1, 1, 1]])
    slots, seen = plan.choose_slots(mass, 2, lambda s: True), []
    while slots is not None:
        seen.append(slots)
        slots = plan.next_lower(mass, 2, slots)
    assert seen[0] == (4, 4)
    assert seen[-1] == (2, 2)
    assert [sum(s) for s in seen] == sorted({sum(s) for s in seen}, reverse=True)
