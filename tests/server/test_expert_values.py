import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.expert_values import (
    exploration_bonus,
    hfedmoe_score,
    redundancy,
    smooth,
    values,
)
from server.relevance import RELEVANCE, StatsError


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 40))
def test_redundancy_sums_to_the_mutual_information(seed, experts, tokens):
    g = np.random.default_rng(seed).dirichlet(np.ones(experts) * 0.5, (1, tokens))
    g = np.maximum(g, 1e-12) / np.maximum(g, 1e-12).sum(-1, keepdims=True)
    red = redundancy(g.sum(1), (g * np.log(g)).sum(1))
    p = g.mean(1)
    information = -(p * np.log(p)).sum() - (-(g * np.log(g)).sum(-1)).mean()
    assert red.min() >= 0
    assert red.sum() == pytest.approx(information, abs=1e-6)


def test_values_without_any_tokens_in_a_layer_are_uniform_in_relevance():
    stats = {k: np.zeros((1, 4), np.float32) for k in ("mass", "top", "g_log_g", "output_norm")}
    np.testing.assert_allclose(values(stats, beta=0.0), np.full((1, 4), 0.25))


def test_beta_takes_value_from_redundant_experts():
    stats = {
        "mass": np.array([[1.0, 1.0]], np.float32),
        "top": np.array([[1.0, 1.0]], np.float32),
        # Expert 0 is all or nothing (informative about x), expert 1 always one half.
        "g_log_g": np.array([[0.0, -0.6931]], np.float32),
        "output_norm": np.zeros((1, 2), np.float32),
    }
    v = values(stats, beta=0.1)
    np.testing.assert_allclose(v, [[0.5 - 0.1, 0.5]], atol=1e-4)


def test_layers_that_other_tokens_pass_do_not_matter():
    # The second layer is a decoder's: a tenth of the tokens, routed alike.
    alike = {k: np.array([[30.0, 10.0], [3.0, 1.0]], np.float32) for k in ("mass", "top")}
    stats = {
        **alike,
        "g_log_g": np.array([[-6.0, -9.0], [-0.6, -0.9]], np.float32),
        "output_norm": np.array([[20.0, 30.0], [2.0, 3.0]], np.float32),
    }
    encoder, decoder = values(stats, beta=0.5)
    np.testing.assert_allclose(encoder, decoder, atol=1e-6)


def test_moving_average_starts_with_the_first_value():
    np.testing.assert_allclose(smooth(None, np.array([2.0])), [2.0])
    np.testing.assert_allclose(smooth(np.array([2.0]), np.array([4.0])), [2.6])


def test_exploration_prefers_what_was_rarely_trained():
    bonus = exploration_bonus(np.array([[0, 3]]), round=5, strength=0.1)
    np.testing.assert_allclose(bonus, 0.1 * 0.5 * np.sqrt(np.log(5) / np.array([[1, 4]])))


def routed(g, top_k):
    """Statistics of a router's probabilities [N, E], by hand."""
    kept = g >= np.sort(g, 1)[:, [-top_k]]
    with np.errstate(divide="ignore", invalid="ignore"):
        g_log_g = np.where(g > 0, g * np.log(g), 0)
    return {
        "mass": g.sum(0)[None],
        "top": (g * kept).sum(0)[None],
        "g_log_g": g_log_g.sum(0)[None],
        "peak": g.max(0)[None],
        "high": np.sort(g, 0)[[-1]],
        "output_norm": np.zeros((1, g.shape[1])),
        "taylor": np.zeros((1, g.shape[1])),
        "label_information": np.zeros((1, g.shape[1])),
    }


def test_hfedmoe_as_printed_by_hand():
    g = np.array([[0.5, 0.5], [1.0, 0.0]])
    # Means 3/4 and 1/4, maxima 1 and 1/2, KL (ln(2/3)/2 + ln(4/3)) / 2 and (ln 2) / 4.
    kl = np.array([(np.log(2 / 3) / 2 + np.log(4 / 3)) / 2, np.log(2) / 4])
    s = 0.25 * np.array([0.75, 0.25]) + 0.75 * np.array([1.0, 0.5])
    stats = routed(g, 1)
    np.testing.assert_allclose(hfedmoe_score(stats, beta=2.0, lam=0.25), [s - 2 * kl], atol=1e-12)
    got = values(stats, 2.0, "hfedmoe", lam=0.25)
    np.testing.assert_allclose(got, [(s - 2 * kl) / s.sum()], atol=1e-12)


def test_a_rare_topics_expert_survives_by_its_peak():
    # Expert 3 serves one token in twenty, with certainty; 2 gets a fair share of all the others.
    g = np.tile([[0.5, 0.28, 0.21, 0.01]], (20, 1))
    g[0] = [0.0, 0.0, 0.0, 1.0]
    stats = routed(g, 2)
    best = {
        lam: set(np.argsort(-values(stats, 0.0, "hfedmoe", lam)[0])[:2]) for lam in (0.0, 0.5, 1.0)
    }
    assert best == {0.0: {0, 3}, 0.5: {0, 3}, 1.0: {0, 1}}
    assert 3 not in np.argsort(-values(stats, 0.0, "frequency")[0])[:2]


def test_beta_does_not_matter_to_frequency_without_redundancy_statistics():
    stats = {"top": np.array([[6.0, 2.0]])}
    np.testing.assert_allclose(values(stats, 0.0, "frequency"), [[0.75, 0.25]])
    with pytest.raises(StatsError, match="redundancy needs the statistic 'mass', found: top"):
        values(stats, 0.1, "frequency")


@pytest.mark.parametrize("name", sorted(set(RELEVANCE) - {"hfedmoe"}))
@given(st.integers(0, 2**32 - 1))
def test_relevance_sums_to_one_per_layer(name, seed):
    g = np.random.default_rng(seed).dirichlet(np.ones(5), 30)
    np.testing.assert_allclose(values(routed(g, 2), 0.0, name).sum(-1), 1)


def test_an_unknown_estimator_is_named():
    with pytest.raises(StatsError, match="relevance 'best' found, one of frequency"):
        values({}, 0.0, "best")
