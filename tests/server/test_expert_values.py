import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.expert_values import (
    exploration_bonus,
    redundancy,
    relevance,
    smooth,
    values,
)


@given(st.integers(0, 2**32 - 1), st.integers(2, 9), st.integers(1, 40))
def test_redundancy_sums_to_the_mutual_information(seed, experts, tokens):
    g = np.random.default_rng(seed).dirichlet(np.ones(experts) * 0.5, (1, tokens))
    g = np.maximum(g, 1e-12) / np.maximum(g, 1e-12).sum(-1, keepdims=True)
    red = redundancy(g.sum(1), (g * np.log(g)).sum(1))
    p = g.mean(1)
    information = -(p * np.log(p)).sum() - (-(g * np.log(g)).sum(-1)).mean()
    assert red.min() >= 0
    assert red.sum() == pytest.approx(information, abs=1e-6)


def test_relevance_by_hand():
    top, norm = np.array([[1.0, 1.0, 0.0]]), np.array([[1.0, 3.0, 0.0]])
    np.testing.assert_allclose(relevance(top, norm), [[0.5, 1.5, 0.0]])
    # Nothing known about norms: routed mass alone.
    np.testing.assert_allclose(relevance(top, np.zeros((1, 3))), top)


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
