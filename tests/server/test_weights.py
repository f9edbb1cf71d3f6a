from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server import weights
from server.contribution import Contribution, from_stats
from server.rules import Rules


def device(name, trained, **more):
    return Contribution(device=name, tensors={}, trained_tokens=trained, **more)


A = device("a", {(0, 0): 40.0, (0, 1): 10.0}, tokens=80, rows=10, usage={(0, 0): 0.5, (0, 1): 0.1})
B = device("b", {(0, 0): 10.0}, tokens=20, rows=30, usage={(0, 0): 0.05}, age=3)


@pytest.mark.parametrize(
    ("rules", "a", "b"),
    [
        # n_k; b is three rounds old and counts half.
        (Rules(), 40, 5),
        (Rules(staleness=0), 40, 10),
        # |D_k| alone, then with the share of tokens that trained the expert.
        (Rules(temperature=0), 80, 10),
        (Rules(weighting="rows", temperature=0), 10, 15),
        (Rules(weighting="rows", temperature=1), 5, 7.5),
        (Rules(temperature=2), 20, 2.5),
        # b uses the expert too little (HFedMoE eq 17).
        (Rules(weighting="rows", temperature=0, tau=0.1), 10, 0),
    ],
)
def test_weights_by_hand(rules, a, b):
    assert weights.expert_weight(A, (0, 0), rules) == pytest.approx(a)
    assert weights.expert_weight(B, (0, 0), rules) == pytest.approx(b)


def test_shares_by_hand():
    # Totals 50 and 10: a prior of 0.5 is half their median, 15.
    found, prior = weights.shares([A, B], Rules(prior=0.5, staleness=0))
    assert prior == 15
    assert [w for _, w in found[0, 0]] == pytest.approx([40 / 65, 10 / 65])
    assert [w for _, w in found[0, 1]] == pytest.approx([10 / 25])


def test_a_lone_holder_is_copied_only_if_asked():
    found, _ = weights.shares([A, B], Rules(prior=0.5, copy_single=True))
    assert [w for _, w in found[0, 1]] == [1.0]
    assert sum(w for _, w in found[0, 0]) < 1


def test_everybody_counts_or_who_sent_it():
    name = "layers.0.router.1"
    a = Contribution(device="a", tensors={name: np.zeros(2)}, trained_tokens={}, tokens=30)
    b = device("b", {(0, 1): 5.0}, tokens=10)
    for members, wanted in (("all", 30 / 40), ("sent", 1.0)):
        found, _ = weights.shares([a, b], Rules(members=members, prior=0.0))
        assert {k: [w for _, w in v] for k, v in found.items()} == {(0, 1): [wanted]}
    found, _ = weights.shares([a, b], Rules(prior=0.0))
    assert [c.device for c, _ in found[0, 1]] == ["b"]


def test_claims_that_do_not_fit_together_do_not_break_it():
    # More tokens for an expert than in all; no data at all.
    c = device("a", {(0, 0): 9.0}, tokens=3, rows=0)
    assert weights.expert_weight(c, (0, 0), Rules(temperature=16)) == 9
    assert weights.shares([c], Rules(weighting="rows")) == ({}, 0.0)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.01, 1e6), st.integers(0, 9)), max_size=9),
    st.sampled_from([0.0, 0.05, 3.0]),
    st.floats(0, 3),
)
def test_shares_and_what_stays_sum_to_one(made, prior, t):
    devices = [
        device(f"d{i}", {(0, e): n}, tokens=2 * n, age=age) for i, (e, n, age) in enumerate(made)
    ]
    rules = Rules(prior=prior, temperature=t)
    found, mass = weights.shares(devices, rules)
    for key, members in found.items():
        total = sum(weights.expert_weight(c, key, rules) for c, _ in members)
        stays = mass / (mass + total)
        assert sum(w for _, w in members) + stays == pytest.approx(1)
        assert all(0 < w <= 1 for _, w in members)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_a_ratio_of_sums_is_unbiased_under_random_assignment(size):
    # Which devices hold an expert is drawn at random; each changes it by its own number. Averaged over all draws of
    # the same size, the update is the mean over all devices. Dividing by the data of all devices shrinks it instead.
    changes = np.array([3.0, -1.0, 4.0, 1.0, -5.0, 9.0])
    ours, plain = [], []
    for holders in combinations(range(len(changes)), size):
        made = [device(f"d{i}", {(0, 0): 7.0} if i in holders else {}, tokens=7) for i in range(6)]
        found, _ = weights.shares(made, Rules(prior=0.0))
        moved = {c.device: w for c, w in found[0, 0]}
        ours.append(sum(moved.get(f"d{i}", 0.0) * change for i, change in enumerate(changes)))
        plain.append(sum(changes[i] for i in holders) / len(changes))
    assert np.mean(ours) == pytest.approx(changes.mean())
    assert np.mean(plain) == pytest.approx(changes.mean() * size / len(changes))


def test_both_sums_are_unbiased_with_unequal_data():
    # The sums of a_k D_k and of a_k, each over random holders, have the right ratio: that of all devices.
    rng = np.random.default_rng(0)
    data, changes = rng.uniform(1, 9, 7), rng.normal(size=7)
    above, below = [], []
    for size in range(1, 8):
        for holders in combinations(range(7), size):
            made = [device(f"d{i}", {(0, 0): data[i]}) for i in holders]
            mass = [weights.expert_weight(c, (0, 0), Rules()) for c in made]
            above.append(np.dot(mass, changes[list(holders)]))
            below.append(sum(mass))
    assert np.mean(above) / np.mean(below) == pytest.approx(np.dot(data, changes) / data.sum())


def test_statistics_of_an_update():
    stats = {
        "trained_tokens": np.array([[6.0, 0, 2], [3, 3, 0]]),
        "mass": np.array([[3.0, 1, 0], [0, 0, 0]]),
        "peak": np.array([[0.9, 0.5, 0.25], [0, 0, 0]]),
    }
    c = from_stats("a", {}, stats, [4, 6], top_k=2, rows=5, age=1, blend=0.25)
    assert c.trained_tokens == {(4, 0): 6, (4, 2): 2, (6, 0): 3, (6, 1): 3}
    assert (c.tokens, c.rows, c.age) == (4, 5, 1)
    assert c.usage == {(4, 0): 0.75, (4, 1): 0.25}
    assert c.importance[4, 0] == pytest.approx(0.25 * 0.75 + 0.75 * 0.9)
    assert c.importance[4, 2] == pytest.approx(0.75 * 0.25)
