import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from server.coverage import RANGE, coverage_cv, faded, never_trained

TOKENS = hnp.arrays(np.float64, (3, 2, 4), elements=st.sampled_from([0.0, 1.0, 10.0, 1e6]))


def test_by_hand():
    # Mean of the trained cells: (10 + 30 + 20) / 3 = 20.
    got = faded(np.array([[1.0, 1, 1]]), [np.array([[10.0, 30, 0]]), np.array([[20.0, 0, 0]])], 0.5)
    np.testing.assert_allclose(got, [[0.5 + 0.5 + 1, 0.5 + 1.5, 0.5]])


def test_a_round_without_updates_only_fades():
    np.testing.assert_allclose(faded(np.array([[2.0, 0.0]]), [], 0.5), [[1.0, 0.0]])
    with pytest.raises(ValueError, match="shape"):
        faded(None, [])


@given(TOKENS)
def test_each_device_counts_within_range_and_order_does_not_matter(tokens):
    got = faded(None, list(tokens))
    devices = (tokens > 0).sum(0)
    assert (got <= devices * RANGE + 1e-9).all()
    assert (got >= devices / RANGE - 1e-9).all()
    np.testing.assert_allclose(got, faded(None, list(tokens[::-1])))
    np.testing.assert_allclose(got, faded(None, list(tokens * 7)))  # no unit of tokens


def test_coefficient_of_variation_by_hand():
    # Mean 2, standard deviation 1; and an even layer.
    assert coverage_cv(np.array([[1.0, 3.0], [5.0, 5.0]])) == 0.25
    assert coverage_cv(np.array([[1.0, 0.0, 0.0, 0.0]])) == pytest.approx(np.sqrt(3))
    assert coverage_cv(np.zeros((2, 4))) == 0.0
    assert never_trained(np.array([[1.0, 0.0, 0.0, 0.0]])) == 3
