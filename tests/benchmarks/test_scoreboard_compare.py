import math

import numpy as np
import pytest

from benchmarks.federated import compare


def test_quantiles_of_t_beyond_the_table_join_it():
    # scipy.stats.t.ppf(0.975, [31, 60, 1000])
    for freedom, value in ((31, 2.0395), (60, 2.0003), (1000, 1.9623)):
        assert compare.t_quantile(freedom) == pytest.approx(value, abs=1e-3)
    with pytest.raises(ValueError, match="0 degrees"):
        compare.t_quantile(0)


def test_interval_over_seeds_by_hand():
    # 60, 63, 69: mean 64, deviations -4, -1, 5, sd = sqrt(42 / 2) = 4.5826, half = 4.303 * 4.5826 / sqrt(3) = 11.385
    found = compare.t_interval([60, 63, 69])
    assert found.mean == 64
    assert found.half == pytest.approx(11.385, abs=1e-3)
    assert found.sign == 1
    assert compare.t_interval([-1.0, 1.0, 0.0]).sign == 0
    assert compare.t_interval([-5.0, -5.1]).sign == -1


def test_one_seed_has_a_mean_and_no_interval():
    found = compare.t_interval([7.0])
    assert (found.mean, found.count, found.sign) == (7.0, 1, 0)
    assert math.isnan(found.low)
    assert math.isnan(compare.t_interval([1.0, math.nan]).mean)


def test_bootstrap_of_one_seed_is_that_of_its_rows():
    # 100 rows, 60 of +1 and 40 of 0: the mean of a resample is binomial(100, 0.6) / 100, sd 0.049.
    rows = np.repeat([1.0, 0.0], [60, 40])
    found = compare.hierarchical_bootstrap([[rows]], np.random.default_rng(0))
    assert found.mean == pytest.approx(0.6)
    assert found.low == pytest.approx(0.6 - 1.96 * 0.049, abs=0.015)
    assert found.high == pytest.approx(0.6 + 1.96 * 0.049, abs=0.015)


def test_bootstrap_of_single_values_draws_the_seeds():
    # Two seeds, 0 and 2: resamples are 0, 1, 1, 2 with a quarter each, so both ends of the interval are reached.
    found = compare.hierarchical_bootstrap([[[0.0]], [[2.0]]], np.random.default_rng(0))
    assert (found.mean, found.low, found.high) == (1.0, 0.0, 2.0)


def test_bootstrap_has_the_variance_of_both_levels():
    # Against a plain loop that resamples as the docstring says.
    rng = np.random.default_rng(5)
    seeds = [[rng.normal(s, 1, 12), rng.normal(-s, 2, 7)] for s in (0.0, 0.5, 2.0)]
    means = []
    for _ in range(4000):
        drawn = [seeds[i] for i in rng.integers(3, size=3)]
        means.append(np.mean([np.mean([rng.choice(v, len(v)).mean() for v in d]) for d in drawn]))
    found = compare.hierarchical_bootstrap(seeds, np.random.default_rng(1))
    assert [found.low, found.high] == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.05)


def test_tasks_weigh_the_same_whatever_rows_they_have():
    seeds = [[[0.0], [4.0] * 100]]
    assert compare.hierarchical_bootstrap(seeds, np.random.default_rng(0)).mean == 2.0


@pytest.mark.parametrize("seeds", [[], [[]], [[[1.0]], []], [[[]]]])
def test_bootstrap_refuses_what_has_no_mean(seeds):
    with pytest.raises(ValueError, match="wanted"):
        compare.hierarchical_bootstrap(seeds, np.random.default_rng(0))


def test_nothing_to_draw_gives_no_interval():
    assert math.isnan(compare.hierarchical_bootstrap([[[3.0]]], np.random.default_rng(0)).low)
    diverged = compare.hierarchical_bootstrap([[[math.nan]], [[1.0]]], np.random.default_rng(0))
    assert math.isnan(diverged.mean)


def test_coefficient_of_variation_by_hand():
    # 60, 66, 72: mean 66, sd 6
    assert compare.coefficient_of_variation([60, 66, 72]) == pytest.approx(6 / 66)
    assert math.isnan(compare.coefficient_of_variation([60]))


def test_first_round_at_a_level():
    rounds = [0, 5, 10, 15]
    assert compare.first_reaching(rounds, [10, 50, 49, 70], 50) == 5
    assert compare.first_reaching(rounds, [10, 20, 30, 40], 50) is None
    assert compare.first_reaching(rounds, [4.0, 3.0, 2.0, 2.5], 2.0, lower_is_better=True) == 10
