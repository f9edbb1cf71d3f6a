import dataclasses

import numpy as np
import pytest

from edge.session import Batch, LayerStats
from edge.statistics import RoutingSums, Score


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
