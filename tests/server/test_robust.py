import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from server import robust
from server.lora_rules import mean

CHANGES = arrays.arrays(
    np.float64, st.tuples(st.integers(3, 7), st.just(4)), elements=st.floats(-9, 9)
)


@given(CHANGES)
def test_no_minority_moves_the_median_beyond_the_others(changes):
    liars = (len(changes) - 1) // 2
    values = [(row, 1 / len(changes)) for row in changes]
    values[:liars] = [(np.full(4, 1e9), 1 / len(changes))] * liars
    got = robust.robust_mean(np.zeros(4, np.float32), values, "median")
    honest = changes[liars:]
    assert (got <= honest.max(0) + 1e-5).all()
    assert (got >= honest.min(0) - 1e-5).all()


def test_trimming_by_hand():
    values = [(np.array([v]), 0.2) for v in (-1e9, 1.0, 2.0, 6.0, 1e9)]
    assert robust.robust_mean(np.zeros(1, np.float32), values, "trimmed").tolist() == [3.0]
    # With a prior of a fifth: a fifth of the way back to the old value 8.
    values = [(v, 0.8 / 5) for v, _ in values]
    got = robust.robust_mean(np.full(1, 8, np.float32), values, "trimmed")
    assert got.tolist() == pytest.approx([8 + 0.8 * (3 - 8)])


def test_every_stretch_of_ranks_is_judged_by_those_who_have_it():
    # Three have the first row, two the second: there the plain mean counts.
    old = np.zeros((2, 1), np.float32)
    values = [
        (np.array([[1.0], [10.0]]), 0.5),
        (np.array([[2.0], [30.0]]), 0.25),
        (np.array([[99.0]]), 0.25),
    ]
    assert robust.robust_mean(old, values, "median").tolist() == [[2.0], [12.5]]
    np.testing.assert_array_equal(
        robust.robust_mean(old.T, [(v.T, w) for v, w in values], "median").T, [[2.0], [12.5]]
    )


@given(CHANGES)
def test_equal_changes_are_kept_by_every_kind(changes):
    same = [(changes[0], 1 / len(changes))] * len(changes)
    old = np.zeros(4, np.float32)
    for kind in ("mean", "median", "trimmed"):
        np.testing.assert_allclose(
            robust.robust_mean(old, same, kind), changes[0], atol=1e-5, rtol=1e-6
        )


def test_consensus_by_hand():
    # All agree; 3 against 1; a tie; nobody moved.
    a, b = np.array([1.0, 2.0, 1.0, 0.0]), np.array([0.5, -1.0, -1.0, 0.0])
    got = robust.consensus([(a, 0.375), (a, 0.375), (b, 0.25)], (4,))
    assert got.tolist() == [1, 0.5, 0.5, 1]
    got = robust.consensus([(a, 0.5), (b, 0.5)], (4,))
    assert got.tolist() == [1, 0, 0, 1]
    assert robust.damping(got, "drop").tolist() == [1, 0, 0, 1]


def test_clipping_leaves_ordinary_changes_alone():
    assert robust.clip_factors([1.0, 1.5, 2.0, 30.0], 2.0) == pytest.approx([1, 1, 1, 3.5 / 30])
    assert robust.clip_factors([0.0, 0.0, 0.0], 2.0) == [1, 1, 1]
    assert robust.clip_factors([0.0, 1.0], 2.0) == [1, 1]


def test_mean_is_the_plain_mean():
    old = np.ones(2, np.float32)
    values = [(np.array([3.0, 5.0]), 0.5)]
    np.testing.assert_array_equal(robust.robust_mean(old, values, "mean"), mean(old, values))
