import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.relevance import (
    NORM_RANGE,
    RELEVANCE,
    StatsError,
    activation_frequency,
    blend,
    by_norm,
    by_taylor,
    cumulative,
    leave_one_out,
    specific,
)


def test_activation_frequency_is_a_count():
    chosen = np.array([0, 0, 2, 0, 1, 2, 0, 0])  # top-1 of eight tokens
    counts = np.bincount(chosen, minlength=4)[None].astype(float)
    np.testing.assert_allclose(activation_frequency(counts), [[5 / 8, 1 / 8, 2 / 8, 0]])


def test_cumulative_specific_and_blend_by_hand():
    g = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1]])
    general, special = cumulative(g.sum(0)[None]), specific(g.max(0)[None])
    np.testing.assert_allclose(general, [[0.4, 0.5, 0.1]])
    np.testing.assert_allclose(special, [[0.7, 0.8, 0.1]])
    np.testing.assert_allclose(blend(general, special, 0.25), [[0.625, 0.725, 0.1]])
    np.testing.assert_allclose(blend(general, special, 1.0), general)


def test_mass_by_hand():
    stats = {
        "mass": np.array([[6.0, 4.0], [3.0, 2.0]]),
        "top": np.array([[5.0, 1.0], [3.0, 0.0]]),
        "high": np.array([[0.9, 0.6], [0.8, 0.2]]),
    }
    np.testing.assert_allclose(RELEVANCE["mass"](stats, 0.5), [[0.95, 0.4], [1.0, 0.1]])
    del stats["high"]  # not asked for
    np.testing.assert_allclose(RELEVANCE["mass"](stats, 1.0), [[0.5, 0.1], [0.6, 0.0]])


def test_norm_by_hand():
    top, norm = np.array([[1.0, 1.0, 0.0]]), np.array([[1.0, 3.0, 0.0]])
    np.testing.assert_allclose(by_norm({"top": top, "output_norm": norm}), [[0.5, 1.5, 0.0]])
    # Nothing known about norms: routed mass alone.
    np.testing.assert_allclose(by_norm({"top": top, "output_norm": np.zeros((1, 3))}), top)
    # 1000 times the layer's mean counts as NORM_RANGE times.
    top, norm = np.ones((1, 1002)), np.ones((1, 1002))
    norm[0, 0] = 1e9
    assert by_norm({"top": top, "output_norm": norm})[0, 0] == NORM_RANGE


@given(st.integers(0, 2**32 - 1), st.sampled_from([by_norm, by_taylor]))
@settings(deadline=None)
def test_residents_as_a_whole_count_as_their_routed_mass(seed, estimate):
    rng = np.random.default_rng(seed)
    top = rng.uniform(1, 2, (2, 8))
    held = rng.random((2, 8)) < 0.5
    measured = np.where(held, top * rng.uniform(0.8, 1.2, (2, 8)), 0)
    got = estimate({"top": top, "output_norm": measured, "taylor": measured})
    np.testing.assert_allclose(got[~held], top[~held])
    np.testing.assert_allclose((got * held).sum(1), (top * held).sum(1))
    # Whatever unit the measurement has.
    scaled = {"top": top, "output_norm": measured * 1e-3, "taylor": measured * 1e-3}
    np.testing.assert_allclose(estimate(scaled), got)


def test_taylor_keeps_the_order_of_residents_that_the_full_router_never_chose():
    stats = {"top": np.array([[4.0, 0.0, 3.0]]), "taylor": np.array([[1.0, 3.0, 0.0]])}
    np.testing.assert_allclose(by_taylor(stats), [[1.0, 3.0, 3.0]])


def test_labels_fall_back_to_routed_mass_where_nothing_is_known():
    stats = {
        "top": np.array([[3.0, 1.0], [3.0, 1.0]]),
        "label_information": np.array([[0.1, -0.01], [-0.02, 0.0]]),
    }
    np.testing.assert_allclose(RELEVANCE["labels"](stats, 0.5), [[0.1, 0.0], [3.0, 1.0]])


def test_the_oracle_is_a_difference():
    got = leave_one_out(np.array([[2.0, 1.5], [0.5, 1.0]]), 1.0)
    np.testing.assert_allclose(got, [[1.0, 0.5], [-0.5, 0.0]])


@pytest.mark.parametrize("name", sorted(RELEVANCE))
def test_a_missing_statistic_is_named(name):
    with pytest.raises(
        StatsError, match=f"relevance '{name}' needs the statistic '[a-z_]+', found: x"
    ):
        RELEVANCE[name]({"x": np.ones((1, 2))}, 0.5)
    with pytest.raises(StatsError, match="1 dimensions found"):
        RELEVANCE[name](
            dict.fromkeys(("mass", "top", "peak", "label_information"), np.ones(2)), 1.0
        )
