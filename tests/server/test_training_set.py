import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.training_set import CapError, choose, utility, within_uplink
from tests.server.tiny_store import base_index

ALL = np.array(list(itertools.product([0, 1], repeat=12)))


def brute(value, cost, caps):
    fits = (ALL @ cost <= caps * (1 + 1e-9)).all(1)
    return (ALL @ value)[fits].max()


def item_sets(n):
    return st.tuples(st.integers(0, 2**32 - 1), st.integers(1, 3), st.floats(0.05, 0.9)).map(
        lambda x: drawn(n, *x)
    )


def drawn(n, seed, caps, part):
    """Values that follow cost half of the time, as they do where wide slots hold the best experts."""
    rng = np.random.default_rng(seed)
    cost = rng.choice([1.0, 2.0, 4.0], (n, caps)) * rng.uniform(0.9, 1.1, (n, caps))
    value = cost.sum(1) * rng.uniform(0.5, 1.5, n) if seed % 2 else rng.exponential(1.0, n)
    return value, cost, cost.sum(0) * part * rng.uniform(0.7, 1.3, caps)


@given(item_sets(12))
@settings(max_examples=150, deadline=None)
def test_equals_brute_force_for_a_dozen(question):
    value, cost, caps = question
    got, wanted = choose(*question), brute(*question)
    assert (cost[list(got.chosen)].sum(0) <= caps * (1 + 1e-6)).all()
    assert got.value == pytest.approx(value[list(got.chosen)].sum())
    assert got.value == pytest.approx(wanted, rel=1e-6)
    assert got.bound >= wanted - 1e-9


@given(item_sets(12))
@settings(max_examples=100, deadline=None)
def test_a_search_cut_short_breaks_no_cap_and_its_bound_holds(question):
    value, cost, caps = question
    got = choose(*question, steps=200)
    assert (cost[list(got.chosen)].sum(0) <= caps * (1 + 1e-6)).all()
    assert got.bound >= brute(*question) - 1e-9


@pytest.mark.parametrize("seed", range(6))
def test_many_experts_within_two_per_cent_in_a_second(seed):
    question = drawn(1024, seed, 3, 0.3)
    start = time.process_time()
    got = choose(*question)
    assert time.process_time() - start < 2
    assert got.value >= 0.98 * got.bound
    assert (question[1][list(got.chosen)].sum(0) <= question[2] * (1 + 1e-6)).all()


def test_more_room_is_never_worse_and_no_cap_takes_all_of_use():
    value, cost, caps = drawn(12, 5, 2, 0.4)
    worth = [choose(value, cost, caps * f).value for f in (0.5, 1.0, 1.5)]
    assert worth == sorted(worth)
    value[3] = -1.0
    got = choose(value, cost, np.full(2, np.inf))
    assert got.chosen == tuple(i for i in range(12) if i != 3)


def test_nothing_fits_and_nothing_there():
    assert choose(np.ones(3), np.ones((3, 1)), np.array([0.5])).chosen == ()
    assert choose(np.ones(3), np.ones((3, 1)), np.array([0.0])).chosen == ()
    assert choose(np.zeros(0), np.zeros((0, 2)), np.ones(2)).chosen == ()
    # Free experts pass an empty cap.
    assert choose(np.ones(2), np.array([[0.0], [1.0]]), np.array([0.0])).chosen == (0,)


def test_utility_prefers_much_data_and_large_gradients():
    u = utility(np.array([10.0, 10.0, 20.0]), np.array([1.0, 4.0, 1.0]))
    np.testing.assert_allclose(u, [10, 20, 20])


@pytest.mark.parametrize(
    ("value", "cost", "caps"),
    [
        (np.ones(2), np.ones((3, 1)), np.ones(1)),
        (np.array([np.nan, 1]), np.ones((2, 1)), np.ones(1)),
        (np.ones(2), -np.ones((2, 1)), np.ones(1)),
    ],
)
def test_what_cannot_be_used_is_refused(value, cost, caps):
    with pytest.raises(CapError):
        choose(value, cost, caps)


def test_what_is_trained_fits_the_uplink():
    base = base_index()  # 2 layers of 4 experts, hidden 16, intermediate 8
    able = {"0": (2, 0), "1": (3, 1, 0)}
    rank_of = {(0, 2): 2, (0, 0): 2, (1, 3): 2, (1, 1): 1, (1, 0): 1}
    value = np.array([[0.3, 0.0, 0.4, 0.3], [0.2, 0.1, 0.2, 0.5]])
    sides = sum(sum(base.features(p)) for p in base.projections)
    wide, narrow = 4 * (2 * sides + 16), 4 * (sides + 16)

    def trained(cap, **more):
        return within_uplink(able, value, rank_of, base, cap, **more)

    assert trained(0) == trained(1e9) == able
    assert trained(2 * wide) == {"0": (2,), "1": (3,)}
    assert trained(2 * wide + narrow) == {"0": (2,), "1": (3, 0)}
    assert trained((2 * wide + narrow) / 4, bytes_per_number=1) == {"0": (2,), "1": (3, 0)}
    assert trained(1) == {"0": (), "1": (3,)}
