"""Devices that cannot profile: what is predicted for them is nearer to the truth than the base's own routing."""

import numpy as np
import pytest

from server.prediction import Peer, predict

L, E = 3, 8


def fleet(rng, tasks=3, per_task=8):
    """True activations: a device's is its task's with some noise; half of the devices cannot profile."""
    centres = rng.dirichlet(np.full(E, 0.4), (tasks, L))
    truth, task_of = {}, {}
    for task in range(tasks):
        for i in range(per_task):
            name = f"{task}-{i}"
            noise = rng.dirichlet(np.full(E, 1.0), L)
            truth[name], task_of[name] = 0.85 * centres[task] + 0.15 * noise, f"task{task}"
    names = sorted(truth)
    profiled = {n for task in range(tasks) for n in names[task * per_task :][: per_task // 2]}
    rows = {n: float(rng.integers(10, 200)) for n in names}
    peers = {n: Peer(statistics=truth[n], rows=rows[n], task=task_of[n]) for n in profiled}
    return truth, task_of, peers, centres.mean(0)


@pytest.mark.parametrize("seed", range(5))
def test_half_of_the_devices_cannot_profile(seed):
    rng = np.random.default_rng(seed)
    truth, task_of, peers, prior = fleet(rng)
    others = sorted(set(truth) - set(peers))
    assert len(others) == len(truth) / 2
    by_task, by_part, by_prior = [], [], []
    for name in others:
        told = predict(peers, prior, task=task_of[name])
        known = rng.random((L, E)) < 0.3
        part = predict(peers, prior, partial=truth[name] * known, known=known)
        assert (told.source, part.source) == ("task", "similar")
        np.testing.assert_allclose(told.statistics.sum(-1), 1)
        np.testing.assert_allclose(part.statistics.sum(-1), 1)
        np.testing.assert_allclose(part.statistics[known], truth[name][known])
        by_task.append(np.abs(told.statistics - truth[name]).sum())
        # Only where it had to be predicted.
        by_part.append(np.abs(part.statistics - truth[name])[~known].sum())
        by_prior.append(np.abs(prior - truth[name])[~known].sum())
    assert np.mean(by_task) < 0.5 * np.mean([np.abs(prior - truth[n]).sum() for n in others])
    assert np.mean(by_part) < 0.7 * np.mean(by_prior)


def test_weights_by_hand():
    prior = np.array([[0.25, 0.75]])
    a, b = np.array([[1.0, 0.0]]), np.array([[0.2, 0.8]])
    peers = {"a": Peer(statistics=a, rows=1, task="t"), "b": Peer(statistics=b, rows=3, task="t")}
    np.testing.assert_allclose(predict(peers, prior, task="t").statistics, [[0.4, 0.6]])
    # Nobody has rows: all count the same.
    even = {n: Peer(statistics=p.statistics, rows=0, task="t") for n, p in peers.items()}
    np.testing.assert_allclose(predict(even, prior, task="t").statistics, [[0.6, 0.4]])


def test_the_prior_is_the_last_resort():
    prior = np.array([[0.25, 0.75]])
    peers = {"a": Peer(statistics=np.array([[1.0, 0.0]]), rows=1, task="t")}
    for found in (
        predict({}, prior, task="t"),
        predict(peers, prior),
        predict(peers, prior, task="u"),
        predict(peers, prior, partial=np.zeros((1, 2)), known=np.zeros((1, 2), bool)),
    ):
        assert found.source == "prior"
        np.testing.assert_allclose(found.statistics, prior)


def test_what_is_known_stays_and_the_rest_is_shared():
    prior = np.array([[0.25, 0.25, 0.5]])
    known = np.array([[True, False, False]])
    partial = np.array([[0.4, 0.0, 0.0]])
    found = predict({}, prior, partial=partial, known=known)
    np.testing.assert_allclose(found.statistics, [[0.4, 0.2, 0.4]])
    peers = {"a": Peer(statistics=np.array([[1.0, 0.0, 0.0]]), rows=1)}
    found = predict(peers, prior, partial=partial, known=known)
    np.testing.assert_allclose(
        found.statistics, [[0.4, 0.3, 0.3]]
    )  # the peer knows nothing of the rest
    full = predict(peers, prior, partial=prior, known=np.ones((1, 3), bool))
    np.testing.assert_allclose(full.statistics, prior)
    with pytest.raises(ValueError, match="both or neither"):
        predict(peers, prior, partial=partial)
