import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from export.knapsack import Infeasible, solve


def brute_force(values, costs, caps, allowed):
    """The best value of any choice within the caps; None when there is none."""
    best = None
    for states in itertools.product(*(np.flatnonzero(row) for row in allowed)):
        at = np.arange(len(states)), np.array(states)
        if (costs[at].sum(0) <= caps * (1 + 1e-9)).all():
            best = max(values[at].sum(), -np.inf if best is None else best)
    return best


def value_of(values, states):
    return values[np.arange(len(states)), states].sum()


@st.composite
def instances(draw, items=8, states=4, caps=3):
    """States that cost and mostly bring more and more, the first one free; sometimes it is not allowed."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n = draw(st.integers(1, items))
    j = draw(st.integers(2, states if n > 5 else states + 2))
    c = draw(st.integers(1, caps))
    equal = draw(st.booleans())
    steps = rng.random((1 if equal else n, j, c)) ** draw(st.sampled_from((1, 4)))
    steps[:, 0] = 0
    costs = np.broadcast_to(np.cumsum(steps, 1), (n, j, c)).copy()
    gains = rng.random((n, j)) * (rng.random((n, 1)) ** draw(st.sampled_from((0, 3))))
    gains[:, 0] = 0
    values = np.cumsum(gains, 1) if draw(st.booleans()) else gains
    allowed = np.ones((n, j), bool)
    allowed[:, 0] = rng.random(n) > draw(st.sampled_from((0, 0.3)))
    full = costs[:, -1].sum(0)
    room = rng.random(c) * draw(st.sampled_from((0.3, 1.0, 1.5)))
    return values, costs, full * room, allowed


@settings(deadline=None, max_examples=80)
@given(instances())
def test_within_two_percent_of_brute_force(instance):
    values, costs, caps, allowed = instance
    best = brute_force(values, costs, caps, allowed)
    order = np.arange(len(values))
    if best is None:
        with pytest.raises(Infeasible):
            solve(values, costs, caps, allowed, order)
        return
    choice = solve(values, costs, caps, allowed, order)
    assert choice.value == pytest.approx(value_of(values, choice.states))
    assert choice.value >= best - 0.02 * abs(best) - 1e-12
    assert choice.bound >= best - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_twelve_items_within_two_percent_of_brute_force(seed):
    rng = np.random.default_rng(seed)
    mass = np.sort(rng.dirichlet(np.ones(12) * 0.5))[::-1]
    values = np.stack([0 * mass, 0.9 * mass, 1.9 * mass], 1)
    costs = np.broadcast_to(np.array([[0, 0], [4, 0], [6, 2.0]]), (12, 3, 2))
    caps = np.array([30.0, 7.0])
    choice = solve(values, costs, caps, np.ones((12, 3), bool), np.arange(12))
    assert choice.value >= 0.98 * brute_force(values, costs, caps, np.ones((12, 3), bool))


@settings(deadline=None, max_examples=50)
@given(instances(items=60, states=5, caps=4))
def test_never_over_a_cap_never_a_forbidden_state_and_the_same_every_time(instance):
    values, costs, caps, allowed = instance
    order = np.arange(len(values))
    try:
        choice = solve(values, costs, caps, allowed, order)
    except Infeasible:
        return
    at = np.arange(len(values)), choice.states
    assert (costs[at].sum(0) <= caps * (1 + 1e-6) + 1e-12).all()
    assert allowed[at].all()
    assert choice.value <= choice.bound + 1e-9
    assert (solve(values, costs, caps, allowed, order).states == choice.states).all()


def test_many_items_come_close_to_the_bound():
    rng = np.random.default_rng(0)
    mass = rng.dirichlet(np.ones(64) * 0.3, 16).ravel()
    values = np.stack([0 * mass, 0.9 * mass, 0.99 * mass, 1.9 * mass, 1.99 * mass], 1)
    cost = np.array([[0, 0], [4, 0], [8, 0], [5, 1], [9, 1.0]])
    costs = np.broadcast_to(cost, (len(mass), 5, 2))
    caps = np.array([2000.0, 150.0])
    choice = solve(values, costs, caps, np.ones((len(mass), 5), bool), np.arange(len(mass)))
    assert choice.value >= 0.995 * choice.bound


def test_with_one_size_and_one_state_the_most_valuable_are_kept():
    # What HFedMoE's equation 15 does: plain sorting.
    values = np.array([[0, v] for v in (0.1, 0.5, 0.2, 0.9, 0.4)])
    costs = np.array([[[0.0], [1.0]]] * 5)
    choice = solve(values, costs, np.array([3.0]), np.ones((5, 2), bool), np.arange(5))
    assert choice.states.tolist() == [0, 1, 0, 1, 1]


def test_equal_items_are_served_in_order():
    values = np.array([[0, 1.0]] * 40)
    costs = np.array([[[0.0], [1.0]]] * 40)
    order = np.array([1, 0] * 20)
    choice = solve(values, costs, np.array([20.0]), np.ones((40, 2), bool), order)
    assert choice.states.tolist() == [0, 1] * 20


def test_infeasible_names_the_cap():
    values, allowed = np.zeros((2, 1)), np.ones((2, 1), bool)
    with pytest.raises(Infeasible, match="cap 1: 4 of 3") as caught:
        solve(values, np.array([[[1.0, 2.0]]] * 2), np.array([9.0, 3.0]), allowed, np.arange(2))
    assert caught.value.cap == 1


def test_equal_items_under_two_caps_come_close_to_the_bound():
    # Cap 0 holds 100 frozen items; the other lets 50 of them be trained instead of 8 dropped.
    values = np.tile([0, 0.9, 1.6, 1.9], (200, 1))
    cost = np.array([[0, 0.0], [10, 1], [11, 4], [12, 7]])
    costs = np.broadcast_to(cost, (200, 4, 2))
    caps = np.array([1000.0, 250.0])
    choice = solve(values, costs, caps, np.ones((200, 4), bool), np.arange(200))
    assert choice.value >= 0.98 * choice.bound
