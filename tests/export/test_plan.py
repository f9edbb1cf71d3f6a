import itertools

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


def test_the_highest_threshold_within_the_budget_is_found_by_brute_force_too():
    rng = np.random.default_rng(0)
    for _ in range(20):
        mass = prior(rng.random((3, 4)) ** 3)
        budget = int(rng.integers(6, 13))
        found = plan.choose_slots(mass, 2, lambda s, b=budget: sum(s) <= b)
        ordered = np.cumsum(-np.sort(-mass, axis=1), axis=1)

        def worst(slots, ordered=ordered):
            return min(ordered[i, n - 1] for i, n in enumerate(slots))

        best = max(worst(s) for s in itertools.product(range(2, 5), repeat=3) if sum(s) <= budget)
        assert worst(found) == pytest.approx(best)
        assert sum(found) == min(budget, 12)  # what is left over is used


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


def test_stepping_down_ends_at_the_least():
    assert plan.fewer((4, 3, 4), 2) == (3, 3, 3)
    assert plan.fewer((2, 2), 2) is None
