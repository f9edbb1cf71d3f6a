"""N-gram models against numbers worked out by hand, and the laws of probability."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference_base.ngram import Trigram, unigram

# a b a b c: trigrams aba, bab, abc; their bigrams ba, ab, bc, each after one token.
TEXT = np.array([0, 1, 0, 1, 2])


@pytest.fixture(scope="module")
def model():
    return Trigram.fit(TEXT, vocabulary=3, discount=0.5)


def test_unigram_counts_plus_one():
    assert np.exp(unigram(TEXT, 4)).tolist() == pytest.approx([3 / 9, 3 / 9, 2 / 9, 1 / 9])


@pytest.mark.parametrize(
    ("text", "probability"),
    [
        # P(a) = (1 - .5) / 3 + .5 * 3 / 3 / 3 = 1/3; P(a|b) = .5 / 2 + .5 * 2 / 2 * P(a) = 5/12;
        # P(a|ab) = .5 / 2 + .5 * 2 / 2 * P(a|b) = 11/24
        ([0, 1, 0], 11 / 24),
        # P(b|b): b never follows b, so .5 * 2 / 2 * P(b) = 1/6; P(b|ab) = .5 * 1/6
        ([0, 1, 1], 1 / 12),
        # cc and c were never contexts: P(a) remains
        ([2, 2, 0], 1 / 3),
        # ba is a context (total 1, one type), a too: P(b|a) = .5 + .5 / 3; P(b|ba) = .5 + .5 * 2/3
        ([1, 0, 1], 5 / 6),
    ],
)
def test_by_hand(model, text, probability):
    assert np.exp(model.log_probabilities(np.array(text))) == pytest.approx([probability])


def test_unseen_token_gets_a_share_of_the_uniform():
    model = Trigram.fit(TEXT, vocabulary=5, discount=0.5)
    # No context, no count: .5 * 3 types / 3 / 5
    assert np.exp(model.log_probabilities(np.array([4, 4, 3]))) == pytest.approx([0.1])


texts = st.lists(st.integers(0, 4), min_size=3, max_size=60)


@given(texts, st.integers(0, 4), st.integers(0, 4), st.sampled_from([None, 0.3, 0.8]))
def test_probabilities_sum_to_one(text, first, second, discount):
    model = Trigram.fit(np.array(text, dtype=np.uint16), 5, discount)
    after = [model.log_probabilities(np.array([first, second, w])) for w in range(5)]
    assert np.exp(after).sum() == pytest.approx(1)


def test_one_call_for_many_tokens_is_many_calls(model):
    text = np.array([0, 1, 2, 0, 1, 0])
    one = [model.log_probabilities(text[i : i + 3])[0] for i in range(4)]
    assert model.log_probabilities(text).tolist() == one
