import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.federated import metrics

WORDS = st.lists(st.sampled_from(["the", "cat", "sat", "on", "mat", "A", "1999"]), max_size=8)


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        ("September 4, 2002", "September", 0.5),  # P 1/3, R 1
        ("The cat", "an cat!", 1.0),
        ("cat cat cat dog", "cat cat", 2 / 3),  # 2 in common: P 1/2, R 1
        ("dog", "cat", 0.0),
        ("", "cat", 0.0),
        ("the", "a an", 1.0),
        ("the", "cat", 0.0),
        ("well-known", "well known", 0.0),  # punctuation goes without leaving a space
        ("$5 million", "5 million", 1.0),
        ("theatre", "atre", 0.0),  # articles are whole words
    ],
)
def test_squad_f1_by_hand(found, wanted, score):
    assert metrics.squad_f1(found, wanted) == pytest.approx(score)


@pytest.mark.parametrize(
    ("found", "wanted", "score"),
    [
        # pairs: the-cat cat-sat | the-cat cat-sat sat-on: P 1, R 2/3
        ("the cat sat", "the cat sat on", 0.8),
        # a-b three times and b-a twice | a-b once, b-c once: one in common of 5 and of 2
        ("a b a b a b", "A-b c", 2 * (1 / 5) * (1 / 2) / (1 / 5 + 1 / 2)),
        ("cat", "cat", 0.0),
        ("", "the cat", 0.0),
        ("cat the", "the cat", 0.0),
        ("It's 1,000", "it s 1 000", 1.0),
    ],
)
def test_rouge_2_by_hand(found, wanted, score):
    assert metrics.rouge_2(found, wanted) == pytest.approx(score)


@given(WORDS, WORDS, st.sampled_from([metrics.squad_f1, metrics.rouge_2]))
def test_scores_are_symmetric_shares(one, two, measure):
    a, b = " ".join(one), " ".join(two)
    assert 0 <= measure(a, b) <= 1
    assert measure(a, b) == pytest.approx(measure(b, a))
    assert measure(a, a) in (0.0, 1.0)


@given(WORDS, WORDS)
def test_rouge_2_as_by_brute_force(one, two):
    def pairs(words):
        words = [w.lower() for w in words]
        return [(words[i], words[i + 1]) for i in range(len(words) - 1)]

    left, common = pairs(two), 0
    for pair in pairs(one):
        if pair in left:
            left.remove(pair)
            common += 1
    total = len(pairs(one)) + len(pairs(two))
    wanted = 2 * common / total if common else 0.0
    assert metrics.rouge_2(" ".join(one), " ".join(two)) == pytest.approx(wanted)


def test_text_scores_are_by_row():
    assert metrics.text_scores("f1", ["a b", "c"], ["b", "d"]).tolist() == [1.0, 0.0]
    with pytest.raises(KeyError):
        metrics.text_scores("accuracy", [], [])
    with pytest.raises(ValueError, match="argument 2"):
        metrics.text_scores("f1", ["a"], [])


@given(st.lists(st.booleans(), max_size=40))
def test_packed_rows_come_back(right):
    found = np.frombuffer(bytes.fromhex(metrics.packed(right)), np.uint8)
    assert np.unpackbits(found, count=len(right)).astype(bool).tolist() == right
