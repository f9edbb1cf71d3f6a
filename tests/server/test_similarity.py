import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.similarity import activation, cosine, recommended, similar


def test_cosine_by_hand():
    # Flattened (1, 2, 0, 2) and (2, 0, 0, 1): 4 / (3 * sqrt 5).
    a, b = np.array([[1.0, 2.0], [0.0, 2.0]]), np.array([[2.0, 0.0], [0.0, 1.0]])
    assert cosine(a, b) == pytest.approx(4 / (3 * 5**0.5))
    # All layers together, not the mean of the layers' cosines, which is (1/sqrt 5 + 1) / 2 here.
    assert cosine(a, b) != pytest.approx((1 / 5**0.5 + 1) / 2, abs=0.05)
    assert cosine(a, np.zeros((2, 2))) == 0


def test_the_most_similar_come_first_and_ties_go_by_name():
    own = np.array([[1.0, 0.0, 0.0]])
    others = {
        "d": np.array([[0.0, 1.0, 0.0]]),  # 0
        "c": np.array([[1.0, 1.0, 0.0]]),  # 0.707
        "a": np.array([[2.0, 2.0, 0.0]]),  # the same direction
        "b": np.array([[1.0, 0.1, 0.0]]),  # 0.995
    }
    assert list(similar(own, others, 3)) == ["b", "a", "c"]
    assert similar(own, others, 3)["a"] == pytest.approx(0.5**0.5)
    assert similar(own, {}, 3) == {}
    assert len(similar(own, others, 99)) == 4


def test_recommendation_by_hand():
    p = [np.array([[0.6, 0.4]]), np.array([[0.2, 0.8]])]
    # (0.9 * 0.6 + 0.3 * 0.2) / 1.2 = 0.5
    np.testing.assert_allclose(recommended(p, [0.9, 0.3]), [[0.5, 0.5]])
    np.testing.assert_allclose(recommended(p, [0.9, -0.3]), p[0])
    np.testing.assert_allclose(recommended(p, [0.0, 0.0]), [[0.4, 0.6]])


@given(st.lists(st.floats(0, 1e6, width=32), min_size=6, max_size=6))
def test_activation_is_a_share(top):
    share = activation({"top": np.array(top, np.float32).reshape(2, 3)})
    np.testing.assert_allclose(share.sum(-1), 1)
    assert (share >= 0).all()
