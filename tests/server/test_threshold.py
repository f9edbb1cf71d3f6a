import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server.relevance import shares
from server.threshold import ThresholdError, smallest, widest


def brute(p, cost, limit, least, most):
    """The best theta over all numbers of experts per layer: theta is the worst layer's sum of its largest p."""
    layers, experts = p.shape
    order = np.argsort(-p, axis=1, kind="stable")
    best = None
    for counts in itertools.product(range(least, experts + 1), repeat=layers):
        spent = sum(cost[i, order[i, :n]].sum() for i, n in enumerate(counts))
        if spent > limit or any(n > m for n, m in zip(counts, most, strict=True)):
            continue
        theta = min(p[i, order[i, :n]].sum() for i, n in enumerate(counts))
        best = theta if best is None else max(best, theta)
    return best


@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.5, 1.0),
    st.floats(0.2, 1.0),
    st.integers(1, 2),
    st.booleans(),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_equals_brute_force(seed, alpha, part, top_k, bytes_, capped):
    rng = np.random.default_rng(seed)
    p = rng.dirichlet(np.full(4, 0.5), 3)
    cost = rng.uniform(1, 3, (3, 4)) if bytes_ else np.ones((3, 4))
    most = rng.integers(top_k, 5, 3) if capped else np.full(3, 4)
    budget = part * cost.sum()
    wanted = brute(p, cost, alpha * budget, top_k, most)
    if wanted is None:
        with pytest.raises(ThresholdError):
            widest(p, cost, budget, top_k=top_k, alpha=alpha, most=most)
        return
    got = widest(p, cost, budget, top_k=top_k, alpha=alpha, most=most)
    sums = [p[i, list(row)].sum() for i, row in enumerate(got.experts)]
    assert got.cost <= alpha * budget
    assert got.cost == pytest.approx(sum(cost[i, list(r)].sum() for i, r in enumerate(got.experts)))
    assert all(top_k <= len(row) <= m for row, m in zip(got.experts, most, strict=True))
    # top_k experts may reach more than the theta that was asked for.
    assert min(sums) == pytest.approx(wanted, abs=1e-9)
    assert got.theta <= min(sums) + 1e-9
    assert got.experts == smallest(shares(p), got.theta, least=top_k)


def test_layers_keep_different_numbers():
    sharp, flat = [0.9, 0.1, 0, 0], [0.25] * 4
    got = widest(np.array([sharp, flat]), np.ones((2, 4)), 5, top_k=1)
    assert got.experts == ((0,), (0, 1, 2, 3))
    assert got.theta == 0.9


def test_head_room_is_kept_and_a_larger_budget_never_lowers_theta():
    p = np.random.default_rng(1).dirichlet(np.ones(16), 4)
    full = widest(p, np.ones((4, 16)), 32, top_k=2)
    less = widest(p, np.ones((4, 16)), 32, top_k=2, alpha=0.8)
    assert less.cost <= 25.6 < full.cost <= 32
    assert less.theta < full.theta


def test_the_whole_model_when_it_fits():
    p = np.full((2, 3), 1 / 3)
    got = widest(p, np.ones((2, 3)), 6, top_k=1)
    assert (got.theta, got.cost) == (1.0, 6.0)


@given(hnp.arrays(np.float64, (2, 5), elements=st.sampled_from([0.0, 0.1, 0.25, 1.0])))
def test_ties_zeros_and_empty_layers(p):
    got = widest(p, np.ones((2, 5)), 6, top_k=2)
    assert got.cost <= 6
    assert all(len(set(row)) == len(row) >= 2 for row in got.experts)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"budget": 1}, "2 experts in each layer cost 4, 1 there is"),
        ({"alpha": 0.0}, "alpha 0.0 found"),
        ({"p": np.full((2, 3), np.nan)}, "finite p"),
        ({"most": np.array([3, 1])}, "layer position 1: room for 1 experts, top-2"),
    ],
)
def test_what_cannot_be_done_is_said(change, text):
    question = {"p": np.ones((2, 3)), "cost": np.ones((2, 3)), "budget": 6, "top_k": 2, **change}
    with pytest.raises(ThresholdError, match=text):
        widest(**question)
