import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge.session import Batch, LayerStats
from edge.statistics import LabelCounts, RoutingSums, Score, label_information


def batch(labels, targets, weights):
    rows, answers = np.shape(targets)
    return Batch(
        np.zeros((rows, 4), np.int64),
        np.ones((rows, 4), np.float32),
        np.zeros((rows, answers), np.int64),
        np.array(targets, np.int64),
        np.array(weights, np.float32),
        np.array(labels, np.int64),
    )


def test_sums_land_on_global_experts():
    sums = RoutingSums((1, 3), 4, {1: (2, 0), 3: (1,)})
    one = LayerStats(
        np.array([1, 2, 3, 4], np.float32), np.ones(4, np.float32), -np.ones(4, np.float32),
        2.0, np.array([5, 6], np.float32),
        np.array([0.5, 0.25, 0, 1], np.float32), np.array([0.25, 0.25, 0, 0.5], np.float32),
    )  # fmt: skip
    nothing = np.zeros(4, np.float32)
    three = LayerStats(*(nothing,) * 3, 0.0, np.array([7], np.float32), nothing, nothing)
    b = batch([0, -1], [[0], [0]], [[1], [0]])
    sums.add(b, {1: one, 3: three})
    half = dataclasses.replace(one, peak=one.peak / 2)
    sums.add(b, {1: half, 3: three})
    for _ in range(2):
        sums.add_taylor({1: np.array([3, 4], np.float32), 3: np.array([5], np.float32)})
    sums.add_routed(
        {1: np.array([10, 20], np.float32), 3: np.array([5], np.float32)},
        {1: [0], 3: []},  # the others are frozen
    )
    arrays = sums.arrays()
    assert arrays["mass"].tolist() == [[2, 4, 6, 8], [0, 0, 0, 0]]
    assert arrays["output_norm"].tolist() == [[12, 0, 10, 0], [0, 14, 0, 0]]
    assert arrays["trained_tokens"].tolist() == [[20, 0, 0, 0], [0, 0, 0, 0]]
    assert arrays["peak"].tolist() == [[0.375, 0.1875, 0, 0.75], [0, 0, 0, 0]]  # means of batches
    assert arrays["high"].tolist() == [[0.25, 0.25, 0, 0.5], [0, 0, 0, 0]]
    assert arrays["taylor"].tolist() == [[8, 0, 6, 0], [0, 10, 0, 0]]
    assert sums.tokens == 16
    assert sums.missed_mass() == (4 / 20, 0.0)  # of the mass of the layer


def test_a_decoder_with_more_answers_than_a_prompt_has_tokens():
    sums = RoutingSums((0,), 2, {0: (0,)})
    nothing = LayerStats(
        *(np.ones(2, np.float32),) * 3, 1.0, np.ones(1, np.float32), *(np.ones(2, np.float32),) * 2
    )
    sums.add(batch([0], [[0] * 6], [[1] * 5 + [0]]), {0: nothing})
    assert sums.tokens == 5
    assert sums.missed_mass() == (0.5,)


def test_loss_and_accuracy_by_hand():
    score = Score()
    logits = np.zeros((2, 1, 4), np.float32)
    logits[0, 0, 2] = np.log(3)  # 3 / (3 + 1 + 1 + 1)
    logits[1, 0, 0] = 100  # not a label's token
    logits[1, 0, 1] = 1
    score.add(logits, batch([1, -1], [[2], [0]], [[1], [0]]), np.array([1, 2]))
    assert score.loss == pytest.approx(np.log(2))
    assert score.accuracy == 1
    score.add(logits, batch([1, 1], [[2], [2]], [[1], [0]]), np.array([1, 2]))
    assert score.accuracy == pytest.approx(2 / 3)
    assert Score().accuracy == -1
    assert Score().loss == 0


def test_label_information_by_hand():
    """Expert 0 gets sport alone, expert 1 both alike: p = 1/3, 2/3; p(sport) = 2/3; N = 1200."""
    counts = np.array([[400.0, 0.0], [400.0, 400.0]])
    raw0 = 1 / 3 * np.log(1 / (2 / 3))
    raw1 = 2 / 3 * (0.5 * np.log(0.5 / (2 / 3)) + 0.5 * np.log(0.5 / (1 / 3)))
    left = 1 - (1 * 1 / (2 * 1200)) / (raw0 + raw1)
    np.testing.assert_allclose(label_information(counts), [raw0 * left, raw1 * left])


# What devices count is sums of float32.
@given(hnp.arrays(np.float64, (2, 4, 3), elements=st.floats(0, 1000, width=32)))
def test_shares_add_up_to_the_mutual_information_less_its_bias(counts):
    got = label_information(counts)
    assert got.shape == (2, 4)
    assert (got >= 0).all()
    for layer in range(2):
        n = counts[layer].sum()
        if n == 0:
            assert not got[layer].any()
            continue
        p = counts[layer] / n
        h = lambda q: -(q[q > 0] * np.log(q[q > 0])).sum()  # noqa: E731
        information = h(p.sum(0)) + h(p.sum(1)) - h(p)
        kinds = ((p.sum(1) > 0).sum() - 1) * ((p.sum(0) > 0).sum() - 1)
        want = max(0, information - kinds / (2 * n)) if information > 1e-12 else 0
        assert got[layer].sum() == pytest.approx(want, abs=1e-9)


def test_the_correction_takes_chance_away():
    """Labels drawn without regard to experts: the plug-in estimate sees information, the corrected one hardly any."""
    rng = np.random.default_rng(0)
    plain, corrected = [], []
    for _ in range(200):
        counts = rng.multinomial(300, np.full(24, 1 / 24)).reshape(8, 3).astype(float)
        p = counts / 300
        apart = p.sum(1, keepdims=True) * p.sum(0)
        plain.append((p * np.log(np.where(p > 0, p / apart, 1))).sum())
        corrected.append(label_information(counts).sum())
    assert np.mean(plain) > 0.02
    assert np.mean(corrected) < 0.25 * np.mean(plain)


def test_only_batches_of_one_label_are_counted():
    counts, nothing = LabelCounts((1,), 2, 2), np.zeros(2, np.float32)
    stats = lambda *top: {  # noqa: E731
        1: LayerStats(
            *(np.array(top, np.float32),) * 3, 0.0, np.zeros(1, np.float32), nothing, nothing
        )
    }
    rows = batch([0, 0, -1], [[0]] * 3, [[1]] * 3)
    rows.valid[2] = 0  # an empty row of a batch that is not full
    counts.add(rows, stats(500, 0))
    counts.add(batch([1, 1], [[0]] * 2, [[1]] * 2), stats(0, 500))
    got = counts.information()
    np.testing.assert_allclose(got, label_information(np.diag([500.0, 500.0]))[None], rtol=1e-6)
    counts.add(batch([0, 1], [[0]] * 2, [[1]] * 2), stats(900, 100))
    counts.add(batch([-1, -1], [[0]] * 2, [[1]] * 2), stats(900, 100))
    np.testing.assert_array_equal(counts.information(), got)
    assert not LabelCounts((1, 2), 3, 0).information().any()
