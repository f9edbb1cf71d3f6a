"""Targets of the heterogeneity-aware balance: by hand, and what they ask of two kinds of device."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge.balance_targets import KEEP, Targets, evenness, target, wish

SHARES = np.array([0.7, 0.1, 0.1, 0.1])
COUNTS = np.array([[50.0, 0, 3, 1, 7], [0, 0, 0, 0, 0]])


def targets(labels, counts=None, mix=0.2):
    return Targets({0: (0, 1, 2, 3)}, {0: SHARES}, evenness(labels, 4), counts, mix, 1.0)


def test_a_device_of_one_label_keeps_its_skew_and_an_even_one_is_levelled():
    one, even = targets(["sport"] * 9), targets(["a", "b", "c", "d"])
    np.testing.assert_allclose(one.now()[0], SHARES, rtol=1e-6)
    np.testing.assert_allclose(even.now()[0], [0.25] * 4, rtol=1e-6)
    for step in range(100):  # whatever the routing does, the even one stays level
        even.follow({0: np.float32([step, 1, 1, 1])})
    np.testing.assert_allclose(even.now()[0], [0.25] * 4, rtol=1e-6)


def test_the_formula_by_hand():
    got = targets(["a", "a", "b", "b"], COUNTS, mix=0.5).now()[0]  # w = log 2 / log 4
    wished = np.array([1 / 51, 1, 1 / 4, 1 / 2])
    wished /= wished.sum()
    np.testing.assert_allclose(got, 0.5 * 0.25 + 0.5 * (0.5 * SHARES + 0.5 * wished), rtol=1e-6)


def test_it_follows_the_routing():
    moving = targets(["a"])
    moving.follow({0: np.float32([0, 0, 0, 40]), 7: np.float32([1])})
    want = KEEP * SHARES + (1 - KEEP) * np.array([0, 0, 0, 1])
    np.testing.assert_allclose(moving.now()[0], want, rtol=1e-6)
    moving.follow({0: np.zeros(4, np.float32)})  # a step that routed nothing
    np.testing.assert_allclose(moving.now()[0], want, rtol=1e-6)


def test_rarely_trained_experts_of_the_second_layer_are_its_own():
    two = Targets(
        {3: (0, 1), 5: (4, 2)}, {3: np.ones(2) / 2, 5: np.ones(2) / 2}, 0.0, COUNTS, 1.0, 1.0
    )
    np.testing.assert_allclose(two.now()[3], [1 / 52, 51 / 52], rtol=1e-6)
    assert two.now()[5].tolist() == [0.5, 0.5]


@given(
    st.lists(st.floats(0, 1e6), min_size=1, max_size=8),
    st.floats(0, 1),
    st.floats(0, 1),
    st.floats(0, 1e6),
)
def test_always_a_distribution(counts, w, mix, kappa):
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(len(counts)))
    got = target(shares, wish(np.array(counts), kappa), w, mix)
    assert got.min() >= 0
    assert got.sum() == pytest.approx(1)
