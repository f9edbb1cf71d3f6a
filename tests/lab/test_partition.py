import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab.partition import balanced, dirichlet


@given(
    groups=st.lists(st.sampled_from("abcd"), min_size=8, max_size=80),
    devices=st.integers(1, 8),
    alpha=st.sampled_from([0.05, 0.5, 50.0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=60, deadline=None)
def test_parts_are_disjoint_and_of_equal_length(groups, devices, alpha, seed):
    parts = dirichlet(groups, devices, 10, alpha, np.random.default_rng(seed))
    flat = [int(i) for part in parts for i in part]
    assert len(flat) == len(set(flat))
    assert {len(part) for part in parts} == {min(10, len(groups) // devices)}
    assert all(0 <= i < len(groups) for i in flat)


def test_small_alpha_skews_and_large_alpha_does_not():
    groups = ["a", "b", "c", "d"] * 500

    def most(alpha):
        rng = np.random.default_rng(1)
        shares = []
        for part in dirichlet(groups, 4, 100, alpha, rng):
            names = [groups[i] for i in part]
            shares.append(max(names.count(g) for g in "abcd") / len(names))
        return np.mean(shares)

    assert most(0.05) > 0.8
    assert most(500.0) < 0.4


def test_same_seed_same_parts():
    groups = ["a", "b"] * 30
    one, two = (dirichlet(groups, 3, 20, 0.5, np.random.default_rng(4)) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(("rows", "devices", "alpha"), [(3, 4, 1.0), (9, 2, 0.0)])
def test_impossible_partitions_are_refused(rows, devices, alpha):
    with pytest.raises(ValueError, match=r"too few|positive"):
        dirichlet(["a"] * rows, devices, 5, alpha, np.random.default_rng(0))


def test_balanced_takes_at_most_a_fifth_of_a_rare_label():
    labels = ["common"] * 100 + ["rare"] * 10
    rows = balanced(labels, 40, np.random.default_rng(0))
    assert [sum(labels[i] == name for i in rows) for name in ("common", "rare")] == [2, 2]
